"""Bonuses that count visits."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from bonus_worlds import restored, scored, walked, wandering
from tensordict import TensorDict
from torch import Tensor

from regimen.checkers import check
from regimen.rewards import CountBonus, Scene, judge, row_key, value_variance
from regimen.rewards.counts import count_visits
from regimen.rollout import Rollout

TWO_EPISODES = ["ABAC", "AADB"]
HALF = 0.5**0.5
THIRD = 3**-0.5


def itself(states: Tensor) -> Tensor:
    return states


def counting(scope: Any = "global", form: Any = "sqrt", **options: Any) -> CountBonus:
    return CountBonus(scope, itself, form, **options)


def ones_by_one(pieces: list[Rollout], scope: str) -> list[Tensor]:
    """The numbers of visits, counted copy by copy, step by step."""
    counts: Counter[Any] = Counter()
    episode: Counter[int] = Counter()
    found = []
    for piece in pieces:
        number = torch.zeros(piece.mask.shape, dtype=torch.int64)
        for step in range(piece.steps):
            for first in (True, False):
                for copy in range(len(piece)):
                    if first and not piece["start"][copy, step]:
                        continue
                    episode[copy] += first
                    state = int((piece.observations if first else piece["next_observations"])[copy, step])
                    key = state if scope == "global" else (copy, episode[copy], state)
                    counts[key] += 1
                    number[copy, step] = counts[key]
        found.append(number)
    return found


def test_visits_have_the_numbers_of_the_worked_example() -> None:
    known, counts = torch.zeros(2, 0, dtype=torch.int64)
    first, known, counts = count_visits(known, counts, torch.tensor([0, 1, 0, 2]))
    second, known, counts = count_visits(known, counts, torch.tensor([0, 0, 3, 1]))
    assert first.float().rsqrt().tolist() == pytest.approx([1, 1, HALF, 1])
    assert second.float().rsqrt().tolist() == pytest.approx([THIRD, 0.5, 1, HALF])
    assert known.tolist() == [0, 1, 2, 3]
    assert counts.tolist() == [4, 2, 1, 1]


def test_known_keys_stay_in_order_when_new_ones_come_between() -> None:
    known, counts = torch.tensor([-5, 3]), torch.tensor([2, 7])
    numbers, known, counts = count_visits(known, counts, torch.tensor([9, 0, -5, -9, 0]))
    assert numbers.tolist() == [1, 1, 3, 1, 2]
    assert known.tolist() == [-9, -5, 0, 3, 9]
    assert counts.tolist() == [1, 3, 2, 7, 1]


def test_global_episodic_and_product_are_those_of_the_worked_example() -> None:
    episodic, glob = counting("episodic", "first"), counting()
    rollout = walked(TWO_EPISODES)
    assert scored(counting(), rollout)[0].tolist() == pytest.approx([1, HALF, 1, 0.5, 1, HALF])
    assert scored(counting("episodic", "first"), rollout)[0].tolist() == [1, 0, 1, 0, 1, 1]
    assert scored(episodic * glob, rollout)[0].tolist() == pytest.approx([1, 0, 1, 0, 1, HALF])


def test_a_sum_of_bonuses_weighs_the_global_one() -> None:
    both = counting("episodic", "first") + 0.5 * counting()
    assert [knob.name for knob in both.knobs] == ["weight/episodic_count", "weight/global_count"]
    total = scored(both, walked(TWO_EPISODES))[0]
    assert total.tolist() == pytest.approx([1.5, HALF / 2, 1.5, 0.25, 1.5, 1 + HALF / 2])


def test_the_product_is_zero_wherever_the_episodic_factor_is() -> None:
    episodic = counting("episodic", "first")
    for piece in wandering(copies=5, steps=12, pieces=3):
        product = episodic * counting()
        judged, _ = judge(product, piece, Scene())
        again = judged.rewards["episodic_count"] == 0
        assert bool(again.any())
        assert not bool(judged.reward[again].any())


def test_within_one_episode_from_nothing_both_scopes_agree() -> None:
    rollout = walked(["ABACABCDDA"])
    assert torch.equal(scored(counting(), rollout), scored(counting("episodic"), rollout))


def test_copies_are_counted_in_order_within_a_step() -> None:
    rollout = walked(["AC"], ["BC"], ["BC"])
    assert scored(counting(), rollout)[:, 0].tolist() == pytest.approx([1, HALF, THIRD])
    assert scored(counting("episodic"), rollout)[:, 0].tolist() == [1, 1, 1]


def test_all_starts_of_a_step_are_counted_before_its_states() -> None:
    rollout = walked(["AB"], ["BC"])
    assert scored(counting(), rollout)[:, 0].tolist() == pytest.approx([HALF, 1])


def test_the_first_state_of_each_episode_is_counted_once() -> None:
    rollout = walked(["AB", "AC", "AA"])
    assert scored(counting(), rollout)[0].tolist() == [1, 1, 0.5]
    assert scored(counting("episodic"), rollout)[0].tolist() == pytest.approx([1, 1, HALF])


def test_steps_that_do_not_exist_are_not_counted() -> None:
    bonus = counting()
    values = scored(bonus, walked(["ABC"], ["AB"]))
    assert values[1].tolist() == pytest.approx([HALF, 0])
    # Two A, two B and one C; the padding says Z and start.
    assert bonus.save_state()["counts"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("scope", ["global", "episodic"])
def test_random_walks_are_counted_as_one_by_one(scope: str) -> None:
    for seed in range(5):
        pieces, bonus = wandering(copies=6, steps=9, pieces=4, seed=seed), counting(scope)
        for piece, expected in zip(pieces, ones_by_one(pieces, scope), strict=True):
            assert torch.allclose(scored(bonus, piece), expected.float().rsqrt())


@pytest.mark.parametrize("scope", ["global", "episodic"])
def test_stretches_of_a_copy_in_one_rollout_follow_each_other(scope: str) -> None:
    """As when a task collects two samples of every copy."""
    pieces = wandering(copies=4, steps=7, pieces=4)
    apart, joined = counting(scope), counting(scope)
    for first in (0, 2):
        expected = torch.cat([scored(apart, piece) for piece in pieces[first : first + 2]])
        assert torch.equal(scored(joined, Rollout.cat(pieces[first : first + 2])), expected)


@pytest.mark.parametrize("scope", ["global", "episodic"])
def test_a_restored_bonus_goes_on_in_the_middle_of_episodes(scope: str) -> None:
    first, second, third = wandering(copies=6, steps=9, pieces=3)
    bonus = counting(scope)
    scored(bonus, first)
    resumed = restored(bonus, counting(scope))
    for piece in (second, third):
        assert not bool(piece["start"][:, 0].all()), "some episode goes on"
        assert torch.equal(scored(bonus, piece), scored(resumed, piece))


def test_an_episode_goes_on_until_the_next_start() -> None:
    bonus = counting("episodic", "first")
    assert scored(bonus, walked(["AB"], ["AB"])).tolist() == [[1], [1]]
    assert scored(bonus, walked(["BA"], ["BA"], goes_on="0")).tolist() == [[0], [1]]
    assert scored(bonus, walked(["AC"], ["AB"], goes_on="01")).tolist() == [[1], [0]]


def test_copies_that_are_not_there_are_remembered() -> None:
    bonus = counting("episodic", "first")
    scored(bonus, walked(["AB"], ["AC"]))
    scored(bonus, walked(["BC"], goes_on="0"))
    assert scored(bonus, walked(["CB"], ["CC"], goes_on="01")).tolist() == [[0], [0]]


def test_an_ended_episode_is_forgotten() -> None:
    bonus = counting("episodic")
    for piece in wandering(copies=3, steps=50, pieces=4, states=30):
        scored(bonus, piece)
        under_way = 50 - piece["start"].flip(1).float().argmax(1)
        assert bonus.save_state()["tables"]["walk"].shape[1] <= int(under_way.sum())


def test_tasks_have_episodes_of_their_own_and_share_global_counts() -> None:
    rollout = Rollout.cat([walked(["AB"], task="left"), walked(["AB"], task="right")])
    assert scored(counting("episodic", "first"), rollout).tolist() == [[1], [1]]
    assert scored(counting(), rollout)[:, 0].tolist() == pytest.approx([1, HALF])
    on_left = counting("episodic", "first")
    scored(on_left, rollout)
    further = Rollout.cat([walked(["BC"], task="right", goes_on="0"), walked(["BB"], task="left", goes_on="0")])
    assert scored(on_left, further).tolist() == [[1], [0]]


def test_without_a_column_start_every_sample_is_an_episode() -> None:
    bonus = counting("episodic", "first")
    rollout = walked(["ABA"], ["BBC"])
    bare = Rollout(rollout.data.clone(), rollout.task_names).replace(
        step_columns={"next_observations": rollout["next_observations"]}, columns={}
    )
    for _ in range(2):
        assert scored(bonus, bare).tolist() == [[1, 0], [0, 1]]


def test_the_key_reads_an_entry_of_a_table() -> None:
    rollout = walked(TWO_EPISODES)
    noise = torch.Generator().manual_seed(0)

    def table(states: Tensor) -> TensorDict:
        seen = torch.rand(*states.shape, 2, generator=noise)
        return TensorDict({"cell": states, "view": seen}, batch_size=states.shape)

    shown = rollout.replace(observations=table(rollout.observations)).with_step_columns(
        next_observations=table(rollout["next_observations"])
    )
    by_cell = CountBonus(key=lambda seen: seen["cell"])
    assert torch.equal(scored(by_cell, shown), scored(counting(), rollout))
    assert scored(CountBonus(key=lambda seen: row_key(seen["view"])), shown)[0].tolist() == [1] * 6


@pytest.mark.parametrize("scope", ["global", "episodic"])
def test_it_passes_the_checks(scope: str) -> None:
    pieces = wandering(copies=4, steps=5, pieces=2)
    assert check(CountBonus(scope), pieces[0]).messages == []
    both = counting("episodic", "first") * counting() + 0.1 * counting(name="again")
    assert check(both, Rollout.cat(pieces)).messages == []


def test_keys_of_rows_are_equal_exactly_for_equal_rows() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(3, (20_000, 8), generator=rng)
    keys = row_key(rows)
    assert len(keys.unique()) == len(rows.unique(dim=0))
    assert torch.equal(row_key(rows.flip(0)), keys.flip(0))
    for kind in (torch.uint8, torch.float32, torch.float64):
        assert len(row_key(rows.to(kind)).unique()) == len(keys.unique())


def test_keys_of_rows_tell_order_and_shape_of_numbers_apart() -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 3.0], [3.0, 0.0], [1.5, 1.5], [-1.0, 4.0]])
    assert len(row_key(rows).unique()) == len(rows)
    assert row_key(torch.tensor([[0.0], [-0.0]])).unique().numel() == 1
    images = torch.zeros(3, 2, 4, 4)
    images[1, 0, 0, 0] = images[2, 1, 3, 3] = 1e-30
    assert len(row_key(images).unique()) == 3
    assert len(row_key(torch.tensor([True, False, True])).unique()) == 2


def test_large_keys_are_counted() -> None:
    draw = random.Random(0)
    values = [draw.randrange(-(2**63), 2**63) for _ in range(50)]
    sequence = [draw.choice(values) for _ in range(500)]
    known, counts = torch.zeros(2, 0, dtype=torch.int64)
    numbers, known, counts = count_visits(known, counts, torch.tensor(sequence))
    seen: Counter[int] = Counter()
    for value, number in zip(sequence, numbers.tolist(), strict=True):
        seen[value] += 1
        assert seen[value] == number
    assert dict(zip(known.tolist(), counts.tolist(), strict=True)) == dict(seen)


def test_value_variance_is_that_of_the_worked_example() -> None:
    assert value_variance(torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 0]])).tolist() == [0, 0.25]
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[features, contexts\]"):
        value_variance(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scope": "local"}, "scope 'local', form 'sqrt'"), ({"form": "linear"}, "form 'linear'; expected one of global")],
)
def test_unknown_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CountBonus(**options)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (lambda seen: seen.float(), TypeError, "the key function gave torch.float32, expected a tensor of integers"),
        (lambda seen: [[int(s)] for s in seen], TypeError, "the key function gave list, expected a tensor of integers"),
        (lambda seen: seen[:, None], ValueError, r"gave shape \[8, 1\] for 8 states, expected \[8\]; row_key"),
        (lambda seen: row_key(seen / 0 * 0), ValueError, "row_key: an observation holds NaN"),
        (
            lambda seen: row_key(TensorDict({"cell": seen, "view": seen}, batch_size=[len(seen)])),
            TypeError,
            "given a table with cell, view; choose",
        ),
    ],
)
def test_keys_that_are_none_are_refused(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CountBonus(key=key).score(walked(TWO_EPISODES), Scene())


def test_a_rollout_without_next_observations_says_what_it_has() -> None:
    bare = walked(TWO_EPISODES).replace(step_columns={})
    judged, report = judge(counting(), bare, Scene())
    assert report.failed == 1
    assert "has no column 'next_observations'; it has: copy" in report.errors[0]
    assert not bool(judged.loss_mask.any())


def test_a_failed_batch_leaves_the_counts_alone() -> None:
    failing = False
    bonus = CountBonus(key=lambda seen: seen.float() if failing else seen)
    first, second = wandering(copies=2, steps=3, pieces=2)
    scored(bonus, first)
    before = bonus.save_state()["counts"].clone()
    failing = True
    _, report = judge(bonus, second, Scene())
    assert report.failed == 2
    assert torch.equal(bonus.save_state()["counts"], before)
