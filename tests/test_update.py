"""Updates: how many minibatches of which samples, and settings that are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from regimen.knobs import Knob
from regimen.memory import NewestRollout, ReplayMemory
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL
from regimen.rollout import Rollout
from regimen.update import Draws, Epochs, Update

Build = Callable[..., Rollout]


def memory_of(build: Build, batch: int, alive: list[int] | None = None) -> NewestRollout:
    rollout = build(batch, columns={"number": torch.arange(batch)})
    if alive is not None:
        loss_mask = torch.zeros(batch, 4, dtype=torch.bool)
        loss_mask[alive, 1] = True
        rollout = rollout.replace(loss_mask=loss_mask)
    memory = NewestRollout()
    memory.add(rollout)
    return memory


def numbers(batches: list[Rollout]) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (1, 2), (2, 3), (3, 1), (1, 10)])
def test_every_epoch_shows_every_sample_once_in_parts_of_equal_size(
    tiny_rollout: Build, rng: torch.Generator, epochs: int, minibatches: int
) -> None:
    shown = numbers(list(Epochs(epochs, minibatches)(memory_of(tiny_rollout, 10), rng)))
    assert len(shown) == epochs * minibatches
    assert max(map(len, shown)) - min(map(len, shown)) <= 1
    for epoch in range(epochs):
        parts = shown[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(number for part in parts for number in part) == list(range(10))


def test_epochs_are_shuffled_anew_from_the_given_generator(tiny_rollout: Build) -> None:
    memory = memory_of(tiny_rollout, 20)
    runs = [numbers(list(Epochs(2, 2)(memory, torch.Generator().manual_seed(seed)))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][:2] != runs[0][2:]


@pytest.mark.parametrize("minibatches", [1, 3, 50])
def test_every_epoch_shows_every_single_step_once(tiny_rollout: Build, rng: torch.Generator, minibatches: int) -> None:
    """With its own values; of 10 samples of 4 steps, so that some of 50 minibatches are empty."""
    memory = memory_of(tiny_rollout, 10)
    step = torch.arange(4).expand(10, 4)
    memory.add(memory.newest().with_step_columns(step=step))
    expected = sorted((number, place) for number in range(10) for place in range(4))
    batches = list(Epochs(2, minibatches, "step")(memory, rng))
    for epoch in range(2):
        parts = batches[epoch * minibatches : (epoch + 1) * minibatches]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        shown = [
            pair for part in parts for pair in zip(part["number"].tolist(), part["step"][:, 0].tolist(), strict=True)
        ]
        assert sorted(shown) == expected
        assert minibatches == 1 or shown != expected


def test_samples_without_a_step_to_learn_from_are_left_out(tiny_rollout: Build, rng: torch.Generator) -> None:
    memory = memory_of(tiny_rollout, 10, alive=[1, 4, 5, 9])
    for minibatches in (1, 2):
        shown = numbers(list(Epochs(1, minibatches)(memory, rng)))
        assert Counter(number for part in shown for number in part) == Counter([1, 4, 5, 9])
        assert {len(part) for part in shown} == {4 // minibatches}
    assert numbers(list(Epochs()(memory_of(tiny_rollout, 10, alive=[]), rng))) == [[]]


def test_draws_come_from_the_memory(tiny_rollout: Build, rng: torch.Generator) -> None:
    memory = ReplayMemory(8)
    for first in (0, 6):
        memory.add(tiny_rollout(6, columns={"number": torch.arange(first, first + 6)}))
    shown = numbers(list(Draws(steps=20, size=5)(memory, rng)))
    assert [len(part) for part in shown] == [5] * 20
    assert {number for part in shown for number in part} == set(range(4, 12))


def test_is_named_after_its_members() -> None:
    objective = ClippedSurrogateObjective()
    assert Update(objective).name == "policy"
    assert Update(objective, members=["actor", "critic"]).name == "actor+critic"
    assert Update(objective, name="first").name == "first"


def test_learning_rate_may_be_a_knob() -> None:
    objective = ClippedSurrogateObjective() + Knob("kl_weight", 0.1) * ReferenceKL()
    assert [knob.name for knob in Update(objective).knobs] == ["weight/surrogate", "kl_weight"]
    update = Update(objective, learning_rate=Knob("learning_rate", 0.25))
    assert [knob.name for knob in update.knobs] == ["weight/surrogate", "kl_weight", "learning_rate"]
    assert update.build_optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.25


def test_optimiser_takes_its_options() -> None:
    update = Update(
        ClippedSurrogateObjective(), learning_rate=0.5, optimizer=torch.optim.SGD, options={"momentum": 0.9}
    )
    optimizer = update.build_optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.5, 0.9)


def test_bad_settings_are_named() -> None:
    objective = ClippedSurrogateObjective()
    for settings in ({"every": 0}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="Update: every=.*expected at least 1"):
            Update(objective, **settings)
    with pytest.raises(ValueError, match="members is the text 'policy'; expected a list of names"):
        Update(objective, members="policy")
    for make in (lambda: Epochs(0, 1), lambda: Epochs(1, 0), lambda: Draws(0, 1), lambda: Draws(1, 0)):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            make()


def judged(build: Build, totals: list[float]) -> NewestRollout:
    memory = NewestRollout()
    batch = len(totals)
    memory.add(build(batch, columns={"number": torch.arange(batch)}).replace(reward=torch.tensor(totals)))
    return memory


def test_a_knob_of_steps_may_ask_for_none(tiny_rollout: Build, rng: torch.Generator) -> None:
    draws = Draws(Knob("steps/policy", 2, 0, integer=True), 3)
    assert [knob.name for knob in draws.knobs] == ["steps/policy"]
    for steps in (0, 1, 4):
        assert len(list(draws(memory_of(tiny_rollout, 10), rng, {"steps/policy": float(steps)}))) == steps
    assert "steps/policy" in [knob.name for knob in Update(ClippedSurrogateObjective(), batches=draws).knobs]


def test_the_best_are_those_at_or_above_the_quantile(tiny_rollout: Build, rng: torch.Generator) -> None:
    """Of ten, a tenth is the best one, or as many as are as good."""
    for totals, expected in (([0.0, 3, 1, 2, 4, 9, 5, 6, 7, 8], {5}), ([1.0] * 3 + [0.0] * 7, {0, 1, 2})):
        shown = numbers(list(Draws(4, 8, best=0.1)(judged(tiny_rollout, totals), rng)))
        assert {number for batch in shown for number in batch} == expected
    replay = ReplayMemory(8)
    for total in range(12):
        replay.add(judged(tiny_rollout, [float(total)] * 2).newest().with_columns(number=torch.full((2,), total)))
    shown = numbers(list(Draws(4, 8, best=0.5)(replay, rng)))
    assert {number for batch in shown for number in batch} == {10, 11}


def test_shares_and_rewards_that_there_are_not_are_refused(tiny_rollout: Build, rng: torch.Generator) -> None:
    for best in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"Draws: best is {best}, expected a share above 0, up to 1"):
            Draws(1, 1, best=best)
    with pytest.raises(ValueError, match="the samples have no reward; give the stage a reward that trains"):
        next(Draws(1, 1, best=0.5)(memory_of(tiny_rollout, 10), rng))


def test_the_newest_rollout_gives_its_steps_one_by_one(tiny_rollout: Build, rng: torch.Generator) -> None:
    memory = NewestRollout("step")
    memory.add(memory_of(tiny_rollout, 10, alive=[2, 5]).newest())
    drawn = memory.sample(20, rng)
    assert (len(drawn), drawn.steps) == (20, 1)
    assert set(drawn["number"].tolist()) == {2, 5}
    with pytest.raises(ValueError, match="NewestRollout: unit is 'turn', expected 'sample' or 'step'"):
        NewestRollout("turn")  # type: ignore[arg-type]


def test_an_update_may_take_the_samples_of_some_tasks_or_none(tiny_rollout: Build, rng: torch.Generator) -> None:
    memory = NewestRollout()
    parts = [memory_of(tiny_rollout, size).newest() for size in (3, 2)]
    memory.add(Rollout.cat([Rollout(part.data, (name,)) for part, name in zip(parts, ("a", "b"), strict=True)]))
    assert numbers(list(Epochs(tasks=["b"])(memory, rng))) == [[0, 1]]
    assert numbers(list(Epochs(tasks=["a", "b"])(memory, rng))) == [[0, 1, 2, 0, 1]]
    assert numbers(list(Epochs(tasks=["c"])(memory, rng))) == [[]]
    with pytest.raises(ValueError, match="Epochs: tasks is the text 'a'; expected a list of names"):
        Epochs(tasks="a")
