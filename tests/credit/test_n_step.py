"""n-step returns as a part: the discount in force when a batch is drawn."""

from __future__ import annotations

import pytest
import torch

from regimen.credit.n_step import NStepReturn
from regimen.knobs import Knob, Knobs
from regimen.rollout import Rollout


def transitions(**fields: object) -> Rollout:
    reward = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    return Rollout.create(task="t", group=torch.zeros(1, dtype=torch.int64), mask=mask, reward=reward, **fields)


def test_a_moved_discount_holds_for_stored_samples() -> None:
    credit = NStepReturn(3, discount=Knob("discount", 0.5, 0, 1))
    knobs = Knobs.of(credit)
    stored = transitions()
    drawn = credit(stored, knobs, {})
    assert float(drawn["n_step_return"][0, 0]) == 2.75
    assert float(drawn["n_step_discount"][0, 0]) == 0.125
    knobs.set("discount", 1.0, by="a test")
    assert float(credit(stored, knobs, {})["n_step_return"][0, 0]) == 6


def test_terminations_stay_terminations() -> None:
    credit = NStepReturn(2, discount=Knob("discount", 0.5, 0, 1))
    drawn = credit(transitions(discount=torch.tensor([[1.0, 0.0, 1.0]])), Knobs.of(credit), {})
    assert drawn["n_step_return"].tolist() == [[2, 2, 3]]
    assert drawn["n_step_discount"].tolist() == [[0, 0, 0.5]]


def test_bootstraps_from_a_column() -> None:
    rollout = transitions().with_columns(root_value=torch.tensor([[10.0, 20.0, 30.0]]), bootstrap=torch.tensor([40.0]))
    drawn = NStepReturn(2, bootstrap="root_value")(rollout, {}, {})
    assert drawn["value_target"].tolist() == [[1 + 2 + 30, 2 + 3 + 40, 3 + 40]]


def test_reward_of_a_sample_counts_at_its_last_step() -> None:
    rollout = transitions().replace(reward=torch.tensor([5.0]))
    assert NStepReturn(2)(rollout, {}, {})["n_step_return"].tolist() == [[0, 5, 5]]


def test_errors() -> None:
    with pytest.raises(ValueError, match="n is 0, expected at least 1"):
        NStepReturn(0)
    rollout = transitions()
    bare = Rollout.create(task="t", group=rollout.group, mask=rollout.mask)
    with pytest.raises(ValueError, match="no reward"):
        NStepReturn(1)(bare, {}, {})


def test_sums_end_where_an_episode_is_cut() -> None:
    cut = torch.tensor([[False, True, False]])
    rollout = transitions().with_step_columns(cut=cut)
    assert NStepReturn(3)(rollout, {}, {})["n_step_return"].tolist() == [[3, 2, 3]]
    with pytest.raises(ValueError, match="goes on with another episode after a cut"):
        NStepReturn(3, bootstrap="cut")(rollout, {}, {})
