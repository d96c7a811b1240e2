"""Distillation of features: worked values, the gradient where there is nothing to learn, and who is trained."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.checkers import check
from regimen.learn import Learner
from regimen.memory import NewestRollout
from regimen.models.torsos import MLPTorso
from regimen.objectives import FeatureDistillation, feature_distance
from regimen.objectives.base import Batch
from regimen.policies import ActionPolicy
from regimen.rollout import Rollout
from regimen.update import Update


def seen(after: Tensor, mask: Tensor | None = None, before: Tensor | None = None) -> Rollout:
    mask = torch.ones(after.shape[:2], dtype=torch.bool) if mask is None else mask
    return Rollout.create(
        task="walk",
        group=torch.arange(len(mask)),
        mask=mask,
        observations=torch.zeros_like(after) if before is None else before,
        step_columns={"next_observations": after},
    )


def loss_of(objective: FeatureDistillation, rollout: Rollout, **cast: Any) -> Tensor:
    return objective(Batch(rollout, cast, {}, torch.Generator())).total


def cast_of(seed: int = 0) -> Cast:
    torch.manual_seed(seed)
    return Cast(bonus_target=MLPTorso(3, (8, 4)).requires_grad_(False), bonus_predictor=MLPTorso(3, (16, 4)))


def states(rows: int = 6, steps: int = 4) -> Tensor:
    return torch.randn(rows, steps, 3, generator=torch.Generator().manual_seed(0))


def test_distances_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert feature_distance(student, teacher).tolist() == [12.5, 0]
    assert feature_distance(student, teacher, "norm").tolist() == [5, 0]


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_the_gradient_is_that_of_differences(distance: Any) -> None:
    student, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: feature_distance(x, teacher, distance), student.requires_grad_())


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_equal_features_give_zero_gradient(distance: Any) -> None:
    cast = cast_of()
    twin = MLPTorso(3, (8, 4))
    twin.load_state_dict(cast["bonus_target"].state_dict())
    loss = loss_of(FeatureDistillation(distance=distance), seen(states()), **{**cast, "bonus_predictor": twin})
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not bool(p.grad.any()) for p in twin.parameters() if p.grad is not None)


@pytest.mark.parametrize(("reads", "expected"), [("next_observations", 5.0), ("observations", 13.0)])
def test_it_reads_the_states_it_is_told_to(reads: str, expected: float) -> None:
    rollout = seen(torch.tensor([[[3.0, 4.0]]]), before=torch.tensor([[[5.0, 12.0]]]))
    cast = {"bonus_target": torch.zeros_like, "bonus_predictor": nn.Identity()}
    assert float(loss_of(FeatureDistillation(distance="norm", reads=reads), rollout, **cast)) == expected


def test_it_is_a_mean_over_the_steps_that_are_learned_from() -> None:
    after = torch.tensor([[[1.0], [3.0]], [[8.0], [99.0]]])
    rollout = seen(after, torch.tensor([[True, True], [True, False]]))
    cast = {"bonus_target": torch.zeros_like, "bonus_predictor": nn.Identity()}
    assert float(loss_of(FeatureDistillation(distance="norm"), rollout, **cast)) == pytest.approx(4)
    assert float(loss_of(FeatureDistillation(distance="norm", aggregate="sequence"), rollout, **cast)) == 5


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_a_predictor_learns_a_random_target(distance: Any) -> None:
    cast, rollout = cast_of(), seen(states())
    update = Update(FeatureDistillation(distance=distance), ["bonus_predictor"], learning_rate=0.01)
    memory, learner = NewestRollout(), Learner(update, cast)
    memory.add(rollout)
    before = float(loss_of(update.objective, rollout, **cast).detach())
    for _ in range(200):
        learner.learn(memory, cast, {}, torch.Generator())
    assert float(loss_of(update.objective, rollout, **cast).detach()) < 0.1 * before


def test_the_teacher_gets_no_gradient() -> None:
    cast = cast_of()
    cast["bonus_target"].requires_grad_(True)
    loss_of(FeatureDistillation(), seen(states()), **cast).backward()
    assert all(p.grad is None for p in cast["bonus_target"].parameters())
    assert all(p.grad is not None for p in cast["bonus_predictor"].parameters())


def test_a_projection_bridges_widths_and_learns() -> None:
    members = {**cast_of(), "bonus_predictor": MLPTorso(3, (7,)), "bridge": nn.Linear(7, 4)}
    loss_of(FeatureDistillation(projection="bridge"), seen(states()), **members).backward()
    assert members["bridge"].weight.grad is not None
    with pytest.raises(ValueError, match=r"gave features \[24, 7\] and teacher 'bonus_target' \[24, 4\]; name a proj"):
        loss_of(FeatureDistillation(), seen(states()), **members)


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_it_passes_the_checks(distance: Any) -> None:
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4])[:, None]
    assert check(FeatureDistillation(distance=distance), seen(states(), mask), cast=cast_of()).messages == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="FeatureDistillation: distance 'cosine' is not one of mse, norm"):
        FeatureDistillation(distance="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="feature_distance: distance 'l1' is not one of"):
        feature_distance(torch.ones(1, 2), torch.ones(1, 2), "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"student \[1, 2\] and teacher \[2, 1\] differ"):
        feature_distance(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(KeyError, match="the cast has no member 'bonus_target'; it has: "):
        loss_of(FeatureDistillation(), seen(states()))


# Hidden states of policies


def controller(width: int, seed: int) -> ActionPolicy:
    torch.manual_seed(seed)
    box = spaces.Box(-1, 1, (3,), np.float32)
    return ActionPolicy.for_spaces(box, spaces.Discrete(2), widths=(width,))


def acted(mask: Tensor) -> Rollout:
    seen_ = states(*mask.shape)
    return Rollout.create(
        task="walk",
        group=torch.arange(len(mask)),
        mask=mask,
        observations=seen_,
        actions=torch.zeros(mask.shape, dtype=torch.int64),
        knobs={"temperature": 1.0},
    )


def hidden(projection: str | None = None) -> FeatureDistillation:
    return FeatureDistillation("teacher", "policy", projection, reads="hidden")


def test_hidden_states_are_compared_at_the_steps_that_are_learned_from() -> None:
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4])[:, None]
    cast = {"policy": controller(5, 0), "teacher": controller(5, 1).requires_grad_(False)}
    rollout = acted(mask)
    mine, theirs = (cast[name].torso(rollout.observations[mask]) for name in ("policy", "teacher"))
    expected = (mine - theirs).square().mean()
    assert float(loss_of(hidden(), rollout, **cast).detach()) == pytest.approx(float(expected.detach()))


def test_a_student_policy_learns_the_hidden_states_of_a_wider_teacher() -> None:
    cast = Cast(policy=controller(12, 0), bridge=nn.Linear(12, 7), teacher=controller(7, 1).requires_grad_(False))
    rollout, memory = acted(torch.ones(6, 4, dtype=torch.bool)), NewestRollout()
    learner = Learner(Update(hidden("bridge"), ["policy", "bridge"], learning_rate=0.02), cast)
    memory.add(rollout)
    before = float(loss_of(learner.update.objective, rollout, **cast).detach())
    taught = [p.clone() for p in cast["teacher"].parameters()]
    for _ in range(150):
        learner.learn(memory, cast, {}, torch.Generator())
    assert float(loss_of(learner.update.objective, rollout, **cast).detach()) < 0.1 * before
    assert all(torch.equal(old, new) for old, new in zip(taught, cast["teacher"].parameters(), strict=True))
    with pytest.raises(ValueError, match="name a projection to the teacher's width"):
        loss_of(hidden(), rollout, **cast)


def test_a_trainable_teacher_of_hidden_states_gets_no_gradient() -> None:
    cast = {"policy": controller(5, 0), "teacher": controller(5, 1)}
    loss_of(hidden(), acted(torch.ones(6, 4, dtype=torch.bool)), **cast).backward()
    assert all(p.grad is None for p in cast["teacher"].parameters())
    assert cast["policy"].torso.layers[0].weight.grad is not None


def test_distillation_of_hidden_states_passes_the_checks() -> None:
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4])[:, None]
    cast = Cast(policy=controller(5, 0), teacher=controller(5, 1).requires_grad_(False))
    assert check(hidden(), acted(mask), cast=cast).messages == []
