"""A tiny FLUX.1 Fill: what its transformer is shown is what the pipeline shows, and it is trained through a judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.verdicts import learned_once
from regimen.models.flux_fill import FluxFillDenoiser, packed, places, unpacked
from regimen.objectives import RewardBackpropObjective
from regimen.objectives.base import Batch
from regimen.policies.flow import FlowPolicy
from regimen.rewards import Reward, Scene
from regimen.rollout import Rollout

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def denoiser() -> FluxFillDenoiser:
    torch.manual_seed(0)
    # 4 channels of latents twice, and a mask of 2 x 2 pixels for each latent; 2 x 2 latents are a token.
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=48, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip
    return FluxFillDenoiser(transformer.eval(), guidance=30.0)


def context(batch: int = 3) -> TensorDict:
    rng = torch.Generator().manual_seed(1)
    entries = {
        "masked": torch.randn(batch, 4, 4, 6, generator=rng),
        "mask": (torch.rand(batch, 1, 8, 12, generator=rng) < 0.5).float(),
        "prompt_embeds": torch.randn(batch, 5, 12, generator=rng),
        "pooled": torch.randn(batch, 10, generator=rng),
    }
    return TensorDict(entries, batch_size=[batch])


def test_the_transformer_is_shown_what_the_pipeline_shows_it(denoiser: FluxFillDenoiser) -> None:
    pipeline, given, shown = diffusers.FluxFillPipeline, context(), dict[str, Any]()
    x, sigma = torch.randn(3, 4, 4, 6), torch.tensor([0.9, 0.5, 0.1])
    handle = denoiser.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shown.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        velocity = denoiser(x, sigma, given)
    handle.remove()
    mask = given["mask"][:, 0].view(3, 4, 2, 6, 2).permute(0, 2, 4, 1, 3).reshape(3, 4, 4, 6)
    parts = [pipeline._pack_latents(part, 3, 4, 4, 6) for part in (x, given["masked"], mask)]
    assert torch.equal(shown["hidden_states"], torch.cat(parts, 2))
    assert torch.equal(shown["img_ids"], pipeline._prepare_latent_image_ids(3, 2, 3, "cpu", torch.float32))
    assert torch.equal(shown["timestep"], sigma)
    assert shown["guidance"].tolist() == [30.0] * 3
    assert velocity.shape == x.shape
    with torch.no_grad():
        said = denoiser.transformer(**shown)[0]
    assert torch.equal(velocity, pipeline._unpack_latents(said, 8, 12, 2))


def test_packing_is_undone() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpacked(packed(x), 4, 6), x)
    assert places(2, 3).tolist() == [[0, r, c] for r in range(2) for c in range(3)]


class Bright(Reward):
    """The mean of the image."""

    name, differentiable = "bright", True

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        found: Tensor = rollout["image"].flatten(1).mean(1)
        return found


def test_it_is_trained_through_a_judge_in_one_step(denoiser: FluxFillDenoiser) -> None:
    policy, rng = FlowPolicy(denoiser, (4, 4, 6)), torch.Generator().manual_seed(0)
    knobs = {"sampling_steps": 3, "noise_level": 0.0, "guidance": 1.0}
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    rollout = policy.sample(context(), knobs, rng)
    rollout = rollout.replace(loss_mask=learned_once(rollout.mask, 0.5, rng))
    losses = []
    for _ in range(5):
        loss = RewardBackpropObjective(Bright())(Batch(rollout, {"policy": policy}, {}, rng)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_what_is_missing_or_odd_is_named(denoiser: FluxFillDenoiser) -> None:
    x, sigma = torch.zeros(3, 4, 4, 6), torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="FluxFillDenoiser needs 'pooled'"):
        denoiser(x, sigma, context().exclude("pooled"))
    with pytest.raises(ValueError, match=r"mask holds 0\.5"):
        denoiser(x, sigma, context().update({"mask": torch.full((3, 1, 8, 12), 0.5)}))
    with pytest.raises(ValueError, match=r"mask has size \[3, 1, 8, 13\], expected \[3, 1, 8, 12\]"):
        denoiser(x, sigma, context().update({"mask": torch.zeros(3, 1, 8, 13)}))
    with pytest.raises(ValueError, match="'null_prompt_embeds'"):
        denoiser.unconditional(context())
