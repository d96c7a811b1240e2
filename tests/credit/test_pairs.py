"""Preference pairs: which are made, and that they stay pairs on their way to the objective."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.checkers import check
from regimen.credit.pairs import BestWorstPairSelector, PairsPerObjective, best_and_worst
from regimen.memory import NewestRollout, ReplayMemory
from regimen.rollout import Rollout
from regimen.update import Draws, Epochs


def judged(reward: Tensor, group: Tensor, task: str = "write") -> Rollout:
    """Samples whose one action is their number, so that a row can be told."""
    batch = len(reward)
    return Rollout.create(
        task=task,
        group=group,
        mask=torch.ones(batch, 2, dtype=torch.bool),
        context={"prompt": [f"prompt {int(number)}" for number in group]},
        actions=torch.arange(batch)[:, None].expand(batch, 2),
        reward=reward,
    )


def numbers(rollout: Rollout) -> list[tuple[int, int]]:
    """(chosen, rejected) of every pair."""
    rejected = rollout["rejected"]["actions"]
    return list(zip(rollout.actions[:, 0].tolist(), rejected[:, 0].tolist(), strict=True))


def test_best_and_worst_by_hand() -> None:
    scores = torch.tensor([0.1, 0.9, 0.9, 0.0, -1.0, 5.0, -1.0])
    group = torch.tensor([7, 7, 7, 7, 2, 2, 2])
    best, worst = best_and_worst(scores, group)
    assert best.tolist() == [5, 1]
    assert worst.tolist() == [4, 3]


def test_best_and_worst_leaves_out() -> None:
    scores = torch.tensor([torch.nan, 1.0, 2.0, 9.0])
    include = torch.tensor([False, True, True, False])
    best, worst = best_and_worst(scores, torch.tensor([0, 0, 0, 1]), include)
    assert (best.tolist(), worst.tolist()) == ([2], [1])


def test_pairs_of_groups() -> None:
    reward = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.5])
    pairs = BestWorstPairSelector()(judged(reward, torch.arange(9) // 3), {}, {})
    assert numbers(pairs) == [(1, 0), (7, 6)]
    assert list(pairs.context["prompt"]) == ["prompt 0", "prompt 2"]
    assert pairs.group.tolist() == pairs["rejected"]["group"].tolist()


def test_gap() -> None:
    """Only pairs whose scores differ by more are kept."""
    reward = torch.tensor([0.0, 0.5, 0.0, 0.6])
    pairs = BestWorstPairSelector(min_gap=0.5)(judged(reward, torch.tensor([0, 0, 1, 1])), {}, {})
    assert numbers(pairs) == [(3, 2)]


def test_key_is_a_component() -> None:
    """Other objectives of the same samples are ignored; where the component did not score, there is no pair."""
    rollout = judged(torch.tensor([9.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64))
    rollout = rollout.replace(rewards={"warm": torch.tensor([0.2, torch.nan, 0.7, 0.4])})
    assert numbers(BestWorstPairSelector("warm")(rollout, {}, {})) == [(2, 0)]


def test_reward_per_step_is_summed() -> None:
    rollout = judged(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    rollout = rollout.replace(reward=torch.tensor([[1.0, 1.0], [3.0, -2.0]]))
    assert numbers(BestWorstPairSelector()(rollout, {}, {})) == [(0, 1)]


def test_unjudged_samples_are_in_no_pair() -> None:
    rollout = judged(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64))
    rollout = rollout.replace(loss_mask=torch.tensor([[False] * 2, [True] * 2, [True] * 2]))
    assert numbers(BestWorstPairSelector()(rollout, {}, {})) == [(2, 1)]


def test_no_pairs() -> None:
    """Equal rewards teach nothing: no rows, and nothing breaks on the way."""
    pairs = BestWorstPairSelector()(judged(torch.ones(4), torch.arange(4) // 2), {}, {})
    assert len(pairs) == 0
    memory = NewestRollout()
    memory.add(pairs)
    assert [len(batch) for batch in Epochs(1, 1)(memory, torch.Generator())] == [0]
    ReplayMemory(4).add(pairs)


@pytest.fixture
def many() -> Rollout:
    """24 pairs in which the rejected sample's number is the chosen one's less 1."""
    reward = torch.arange(48.0) % 2
    pairs: Rollout = BestWorstPairSelector()(judged(reward, torch.arange(48) // 2), {}, {})
    return pairs


def whole(rollout: Rollout) -> bool:
    return all(chosen == rejected + 1 for chosen, rejected in numbers(rollout))


def test_shuffled_minibatches_keep_pairs_whole(many: Rollout) -> None:
    memory = NewestRollout()
    memory.add(many)
    batches = list(Epochs(2, 5)(memory, torch.Generator().manual_seed(0)))
    assert all(whole(batch) for batch in batches)
    assert sorted(number for batch in batches[:5] for number, _ in numbers(batch)) == list(range(1, 48, 2))
    assert whole(many[3:7])


def test_replay_keeps_pairs_whole(many: Rollout) -> None:
    memory = ReplayMemory(16)
    memory.add(many[:10])
    memory.add(many[10:])
    rng = torch.Generator().manual_seed(0)
    assert all(whole(batch) for batch in Draws(3, 8)(memory, rng))
    again = ReplayMemory(16)
    again.load_state_dict(memory.state_dict())
    a = memory.sample(8, torch.Generator().manual_seed(1))
    b = again.sample(8, torch.Generator().manual_seed(1))
    assert numbers(a) == numbers(b)


def test_pairs_of_two_tasks_join(many: Rollout) -> None:
    other = BestWorstPairSelector()(judged(torch.arange(4.0) % 2, torch.arange(4) // 2, task="draw"), {}, {})
    both = Rollout.cat([many, other])
    assert both.task_counts() == {"write": 24, "draw": 2}
    assert whole(both)


def test_pair_columns_travel(many: Rollout) -> None:
    marked = many.with_columns(weight=many.actions[:, 0].float())
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    assert marked[order]["weight"].tolist() == [float(chosen) for chosen, _ in numbers(marked[order])]
    assert isinstance(marked["rejected"], TensorDict)


def test_pairs_of_every_objective_are_tagged_on_both_sides() -> None:
    """What is chosen by one objective may be rejected by another, and ties by one leave the other's pair."""
    rewards = {"warm": torch.tensor([0.0, 1.0, 3.0, 2.0]), "short": torch.tensor([5.0, 4.0, 2.0, 2.0])}
    rollout = judged(torch.zeros(4), torch.tensor([0, 0, 1, 1])).replace(rewards=rewards)
    pairs = PairsPerObjective(["warm", "short"])(rollout, {}, {})
    assert numbers(pairs) == [(1, 0), (2, 3), (0, 1)]
    assert pairs["objective"].tolist() == [0, 0, 1]
    assert pairs["rejected"]["columns", "objective"].tolist() == [0, 0, 1]
    assert check(PairsPerObjective(["warm", "short"]), rollout).messages == []


def test_no_more_pairs_of_an_objective_than_asked_for() -> None:
    rewards = {"warm": torch.arange(8.0), "short": torch.zeros(8)}
    rollout = judged(torch.zeros(8), torch.arange(8) // 2).replace(rewards=rewards)
    pairs = PairsPerObjective(["short", "warm"], at_most=3, column="aspect")(rollout, {}, {})
    assert numbers(pairs) == [(1, 0), (3, 2), (5, 4)]
    assert pairs["aspect"].tolist() == [1, 1, 1]
    assert len(PairsPerObjective(["short"])(rollout, {}, {})) == 0


def test_objectives_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys='warm', at_most=None; expected a list of components"):
        PairsPerObjective("warm")
    with pytest.raises(ValueError, match=r"at least one pair of each"):
        PairsPerObjective(["warm"], at_most=0)
    with pytest.raises(ValueError, match=r"no reward 'cold'"):
        PairsPerObjective(["cold"])(judged(torch.ones(2), torch.zeros(2, dtype=torch.int64)), {}, {})


def test_errors() -> None:
    with pytest.raises(ValueError, match="min_gap is -1"):
        BestWorstPairSelector(min_gap=-1)
    rollout = judged(torch.ones(2), torch.zeros(2, dtype=torch.int64)).replace(rewards={"warm": torch.ones(2)})
    with pytest.raises(ValueError, match=r"no reward 'cold' \(components: warm\)"):
        BestWorstPairSelector("cold")(rollout, {}, {})
    with pytest.raises(ValueError, match=r"scores \[2\] and group \[3\], expected \[B\]"):
        best_and_worst(torch.ones(2), torch.ones(3))
