"""What lies outside a mask stays as it is, in samples and in one-step predictions."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from regimen.functions.verdicts import learned_once
from regimen.models.inpainting import InpaintingDenoiser, paste
from regimen.models.mlp_denoiser import MLPDenoiser
from regimen.objectives import FlowMatchingObjective
from regimen.objectives.base import Batch
from regimen.policies.flow import FlowPolicy

KNOBS = {"sampling_steps": 5, "noise_level": 0.0, "guidance": 2.0}


def parts() -> tuple[FlowPolicy, torch.Tensor, TensorDict]:
    torch.manual_seed(0)
    network = MLPDenoiser((5, 4, 6), conditions=3, width=16)
    torch.nn.init.normal_(network.out.weight)
    policy = FlowPolicy(InpaintingDenoiser(network), (2, 4, 6))
    images = torch.rand(7, 2, 4, 6)
    mask = (torch.rand(7, 1, 4, 6) < 0.5).float()
    context = {"masked": images * (1 - mask), "mask": mask, "condition": torch.arange(7) % 3}
    return policy, images, TensorDict(context, batch_size=[7])


def test_samples_and_predictions_keep_what_is_outside_the_mask() -> None:
    policy, images, context = parts()
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(context, KNOBS, rng)
    learned = rollout.replace(loss_mask=learned_once(rollout.mask, 1.0, rng))
    for made in (rollout["image"], policy.reparameterised(learned, rng)["image"]):
        outside = context["mask"].expand_as(images) == 0
        assert torch.allclose(made[outside], images[outside], atol=1e-5)
        assert (made[~outside] - images[~outside]).abs().mean() > 0.1


def test_flow_matching_has_no_loss_outside_the_mask() -> None:
    policy, images, context = parts()
    nothing = TensorDict({**context, "mask": torch.zeros(7, 1, 4, 6), "masked": images}, batch_size=[7])
    rollout = policy.sample(context, KNOBS, torch.Generator()).replace(context=nothing).with_columns(image=images)
    batch = Batch(rollout, {"policy": policy}, {}, torch.Generator().manual_seed(0))
    assert float(FlowMatchingObjective().loss(batch).detach()) == pytest.approx(0, abs=1e-8)


def test_bad_masks_are_named() -> None:
    policy, images, context = parts()
    with pytest.raises(ValueError, match=r"mask holds 0\.5; expected 1 where"):
        paste(images, images, context["mask"] / 2)
    with pytest.raises(ValueError, match=r"mask has size \[7, 1, 4, 5\], expected \[7, 1, 4, 6\]"):
        paste(images, images, context["mask"][..., :5])
    with pytest.raises(ValueError, match="InpaintingDenoiser needs 'mask' in the context"):
        policy.sample(context.exclude("mask"), KNOBS, torch.Generator())
