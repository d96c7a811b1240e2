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
