"""Two members answer the same contexts, from other noise; one step is learned from; annotators label both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.cast import Cast
from regimen.checkers import check
from regimen.models import MLPDenoiser
from regimen.policies.flow import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks import PromptTask
from regimen.tasks.base import Evaluation
from regimen.tasks.side_by_side import SideBySide

KNOBS = {"sampling_steps": 6, "noise_level": 0.0, "guidance": 1.0}


@pytest.fixture
def cast() -> Cast:
    torch.manual_seed(0)
    network = MLPDenoiser((1, 2, 2), 4, 8)
    torch.nn.init.normal_(network.out.weight)
    cast = Cast(policy=FlowPolicy(network, (1, 2, 2), sampling_steps=6, noise_level=0.0))
    cast.snapshot("policy", as_="reference")
    return cast


def task(**options: Any) -> SideBySide:
    rows = TensorDict({"condition": torch.arange(4)}, batch_size=[4])
    return SideBySide(PromptTask("draw", rows, order="sequential"), **options)


def test_both_answer_the_same_contexts_from_other_noise(cast: Cast) -> None:
    rollout = task().collect(cast, KNOBS, torch.Generator().manual_seed(0), 8)
    assert rollout.context["condition"].tolist() == [0, 1, 2, 3] * 2
    difference = (rollout["image"] - rollout["reference_image"]).flatten(1).abs().sum(1)
    assert bool((difference > 1e-3).all())
    assert rollout.loss_mask.sum(1).tolist() == [1] * 8
    assert not bool(rollout.loss_mask[:, :3].any())


def test_the_prediction_is_what_the_objective_will_see_without_its_graph(cast: Cast) -> None:
    rollout = task().collect(cast, KNOBS, torch.Generator().manual_seed(0), 8)
    assert not rollout["prediction"].requires_grad
    made = cast["policy"].reparameterised(rollout, torch.Generator())["image"]
    assert torch.equal(made.detach(), rollout["prediction"])
    last = rollout.loss_mask[:, -1]
    assert torch.allclose(rollout["prediction"][last], rollout["image"][last], atol=1e-5)


def test_annotators_see_all_and_draw_from_the_stream(cast: Cast) -> None:
    def annotate(rollout: Rollout, rng: torch.Generator) -> Mapping[str, Tensor]:
        assert {"image", "prediction", "reference_image"} <= set(rollout.columns.keys())
        return {"said": torch.rand(len(rollout), generator=rng)}

    labelled = task(annotate=annotate)
    first, again = (labelled.collect(cast, KNOBS, torch.Generator().manual_seed(3), 4)["said"] for _ in range(2))
    assert torch.equal(first, again)
    other = labelled.collect(cast, KNOBS, torch.Generator().manual_seed(4), 4)["said"]
    assert not torch.equal(first, other)


def test_it_is_measured_on_the_whole_cast_and_goes_on_where_it_was(cast: Cast) -> None:
    def measure(cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        return Evaluation({"members": float(len(cast))})

    assert task(evaluate=measure).evaluate(cast, KNOBS, torch.Generator()).metrics == {"members": 2.0}
    assert task().evaluate(cast, KNOBS, torch.Generator()).metrics == {}
    one, other = task(), task()
    one.collect(cast, KNOBS, torch.Generator(), 3)
    other.load_state_dict(one.state_dict())
    assert other.collect(cast, KNOBS, torch.Generator(), 1).context["condition"].tolist() == [3]


def test_it_passes_the_checker(cast: Cast) -> None:
    assert check(task(), cast=cast).messages == []
