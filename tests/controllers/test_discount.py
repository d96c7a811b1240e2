"""Automatic discount scheduling: worked scores and advances, what it is shown, replay, other policies, resume."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen import Cast, Draws, Event, Interrupted, Knob, ReferenceRefresh, Regimen, ReplayMemory, Stage, Update, train
from regimen.checkers import check
from regimen.controllers import (
    AutomaticDiscountScheduler,
    Needs,
    Probe,
    discount_from_progress,
    longest_increasing_subsequence,
    match_score,
)
from regimen.credit import GAE
from regimen.models import FrameCosts, small_decoder, word_tokenizer
from regimen.models.value_head import ValueHead
from regimen.objectives import DQNObjective, ppo
from regimen.objectives.base import Batch
from regimen.objectives.look_ahead import look_ahead
from regimen.policies import QPolicy, TokenPolicy
from regimen.rewards import OptimalTransportReward
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks import EnvTask
from regimen.tasks.environments.tensor import ProgressChain
from regimen.tasks.text import TextPromptTask

LINE = torch.arange(6.0)[:, None]
"""Six frames in a row, each 1 from the next."""


def walks(*frames: Tensor) -> Rollout:
    seen = torch.stack(frames)
    return Rollout.create(
        task="walk", group=torch.arange(len(seen)), mask=torch.ones(seen.shape[:2], dtype=torch.bool), observations=seen
    )


def costs(*demonstrations: Tensor) -> FrameCosts:
    return FrameCosts(demonstrations or [LINE], "euclidean")


class Walkers:
    """A task whose samples are given."""

    name, group_size, generates, knobs = "walkers", 1, True, ()

    def __init__(self, *frames: Tensor) -> None:
        self.rollout = walks(*frames)


def scheduler(progress: int = 2, **settings: Any) -> AutomaticDiscountScheduler:
    part = AutomaticDiscountScheduler(costs(), Probe(Walkers(LINE), 1), **{"every": 1, **settings})
    part.progress = progress
    return part


def advanced(frames: Tensor, **settings: Any) -> int:
    part = scheduler(**settings)
    part.advance(part.costs.of(walks(frames)))
    return part.progress


# Scores


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ([0, 1, 2, 3, 4, 5], 6), ([0, 0, 1, 3, 2, 4], 4), ([5, 4, 3, 2, 1], 1), ([2, 2, 2], 1),
        ([3, 1, 2, 5, 4, 6, 0, 7], 5), ([7], 1), ([], 0),
    ],
)  # fmt: skip
def test_the_longest_increasing_subsequence(values: list[int], length: int) -> None:
    assert longest_increasing_subsequence(values) == length


def test_a_match_counts_frames_that_are_gone_through_in_order() -> None:
    demonstration = torch.arange(4.0)[:, None]
    sample = torch.tensor([[0.0], [2.1], [1.2], [2.9]])
    cost = FrameCosts([demonstration], "euclidean").of(walks(sample))[0, 0]
    assert [match_score(cost, k) for k in (1, 2, 3, 4)] == [1, 2, 2, 3]


def test_of_frames_that_are_equally_near_the_first_counts() -> None:
    assert match_score(torch.ones(5, 5), 5) == 1


def test_the_discount_leaves_the_reward_k_steps_ahead_its_weight() -> None:
    assert discount_from_progress(10) == pytest.approx(0.851340, abs=1e-6)
    assert discount_from_progress(50) == pytest.approx(0.968324, abs=1e-6)
    assert discount_from_progress(250) == pytest.approx(0.993583, abs=1e-6)
    assert discount_from_progress(1, 0.3) == 0.3
    values = [discount_from_progress(k) for k in range(1, 60)]
    assert values == sorted(values)
    assert [value**k for k, value in enumerate(values, 1)] == pytest.approx([0.2] * 59)


# Advances


STUCK = torch.tensor([0.0, 1, 2, 0, 0, 0])[:, None]
"""The first three frames, then the first one again."""


def test_a_perfect_sample_is_recognised_to_the_end() -> None:
    assert advanced(LINE) == 6
    assert advanced(LINE, max_progress_delta=3) == 5


@pytest.mark.parametrize(("threshold", "progress"), [(0.9, 5), (1.0, 4), (0.5, 6)])
def test_a_sample_that_turns_back_is_recognised_as_far_as_the_threshold_says(threshold: float, progress: int) -> None:
    assert advanced(STUCK, threshold=threshold) == progress


def test_with_threshold_0_it_is_a_schedule_of_time() -> None:
    assert advanced(torch.zeros(6, 1), threshold=0.0, max_progress_delta=2) == 4


def test_progress_never_falls_and_never_passes_the_end() -> None:
    part = scheduler(progress=5)
    part.advance(part.costs.of(walks(STUCK)))
    before = part.progress
    part.advance(part.costs.of(walks(torch.zeros(6, 1))))
    assert part.progress == before
    part.advance(part.costs.of(walks(LINE)))
    part.advance(part.costs.of(walks(LINE)))
    assert part.progress == 6


def test_the_ninetieth_percentile_needs_the_best_two_of_five() -> None:
    """And the hundredth one alone."""
    lazy = torch.zeros(6, 1)
    one, two = walks(LINE, *[lazy] * 4), walks(LINE, LINE, *[lazy] * 3)
    for rollout, percentile, progress in ((one, 90.0, 2), (one, 100.0, 6), (two, 90.0, 6)):
        part = scheduler(agent_percentile=percentile, threshold=1.0)
        part.advance(part.costs.of(rollout))
        assert part.progress == progress


def test_demonstrations_that_match_each_other_badly_ask_for_less() -> None:
    """A frame that stands still in all of them is nearest to its first copy, and counts once."""
    still = torch.tensor([0.0, 1, 1, 1, 2, 3])[:, None]
    part = AutomaticDiscountScheduler(costs(still, still), Probe(Walkers(still), 1), every=1, threshold=1.0)
    assert [part._reference(k) for k in range(1, 7)] == [1, 2, 2, 2, 3, 4]
    part.advance(part.costs.of(walks(still)))
    assert part.progress == 6


def test_what_demonstrations_match_is_each_other_and_not_themselves() -> None:
    """The third is the first one backwards: of the six ordered pairs two go through in order, and four do not."""
    line = torch.arange(3.0)[:, None]
    make = partial(AutomaticDiscountScheduler, probe=Probe(Walkers(line), 1), every=1, progress_start=0.5)
    several = costs(line, line, line.flip(0))
    assert [make(several)._reference(k) for k in (1, 2, 3)] == [1, 1, 1]
    # From the least, the scores at k = 3 are 1, 1, 1, 1, 3, 3; the percentile lies between the fourth and the fifth.
    assert make(several, reference_percentile=75.0)._reference(3) == pytest.approx(1 + 0.75 * 2)
    assert make(costs(line))._reference(3) == 3


def test_the_first_progress_is_a_part_of_the_length_and_at_least_1() -> None:
    with pytest.warns(UserWarning, match="progress_start=0.01 of 6 frames is none; it starts from 1"):
        starts = [
            AutomaticDiscountScheduler(costs(), Probe(Walkers(LINE), 1), every=1, progress_start=p) for p in (0.5, 0.01)
        ]
    assert [part.progress for part in starts] == [3, 1]
    assert starts[1].discount == pytest.approx(0.2)
    assert starts[0].moves == ("discount",)


# Input


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alpha": 1.0}, "alpha=1.0; expected k at least 1, and alpha in"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"every": 0}, "every=0"),
        ({"progress_start": 0.0}, "progress_start=0.0"),
        ({"agent_percentile": 101.0}, "agent_percentile=101.0; expected from 0 to 100"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        scheduler(**settings)


def test_bad_costs_are_told() -> None:
    with pytest.raises(ValueError, match="the cost holds NaN"):
        match_score(torch.full((3, 3), torch.nan), 2)
    with pytest.raises(ValueError, match=r"k=4 of a cost of shape \[3, 3\]"):
        match_score(torch.zeros(3, 3), 4)


def test_a_probe_of_another_length_is_told() -> None:
    with pytest.raises(ValueError, match="has 4 steps and the demonstrations have 6"):
        costs().of(walks(LINE[:4]))


def test_it_passes_the_checker() -> None:
    assert check(scheduler(every=2), rollout=walks(LINE, STUCK), cast={}).messages == []


# On the chain, off the policy


def chain(name: str, copies: int) -> EnvTask:
    make = partial(ProgressChain, length=6, shortcut=0.8, seed=2)
    return EnvTask(name, make, copies=copies, steps=6, episodes=True, discount=None, evaluation_steps=6)


def led_to(rollout: Rollout) -> Tensor:
    frames: Tensor = rollout["next_observations"]["frame"]
    return frames


def imitation(steps: int, **settings: Any) -> Regimen:
    """Q-learning of a table from a replay memory, paid by transport, under a scheduled discount."""
    torch.manual_seed(0)
    task, probe = chain("chain", 4), chain("probe", 2)
    shown = FrameCosts([ProgressChain(1, length=6, shortcut=0.8, seed=2).expert_frames], "euclidean", led_to)
    moving = AutomaticDiscountScheduler(
        shown, Probe(probe, 2, evaluating=True), every=5, threshold=1.0, **{"max_progress_delta": 1, **settings}
    )
    policy = QPolicy.for_spaces(*task.spaces, reads=("place",), widths=(), epsilon=0.3)
    update = Update(
        DQNObjective(discount=0.99, n=2), learning_rate=0.1, optimizer=torch.optim.Adam, max_grad_norm=None,
        batches=Draws(8, 64),
    )  # fmt: skip
    stage = Stage(
        "imitate", [task], steps, 4, reward=OptimalTransportReward(shown, scale=6.0), updates=[update],
        controllers=[moving], knobs={"discount": moving.discount},
        memory=partial(ReplayMemory, 2000, "transition", ahead=1),
        rules=[ReferenceRefresh("policy_target", of="policy", mode="ema", decay=0.9)],
    )  # fmt: skip
    return Regimen(Cast(policy=policy), [stage])


def quiet(event: Event) -> None:
    """Show nothing."""


def test_q_learning_of_replayed_steps_masters_the_chain_and_ends_at_the_large_discount() -> None:
    seen: list[dict[str, float]] = []
    outcome = train(imitation(40), listener=lambda e: seen.append(dict(e.metrics)) if e.kind == "step" else None)
    assert outcome.evaluations[-1]["metrics"]["chain/success"] == 1
    progress = [metrics["adapt/progress"] for metrics in seen]
    assert progress[0] == 1
    assert progress[-1] == 6
    assert progress == sorted(progress)
    assert seen[-1]["knob/discount"] == pytest.approx(0.2 ** (1 / 6))


def test_the_probes_samples_are_counted_and_greedy() -> None:
    regimen = imitation(11)
    moving, shown = regimen.stages[0].controllers[0], []
    look = moving.advance

    def watched(costs: Tensor) -> None:
        shown.append(costs)
        look(costs)

    moving.advance = watched
    outcome = train(regimen, listener=quiet)
    assert outcome.counters.samples == 11 * 4 + 2 * 2
    assert [list(costs.shape) for costs in shown] == [[2, 1, 6, 6]] * 2
    # Without its exploration a table of values takes the same actions in both copies.
    assert all(torch.equal(costs[0], costs[1]) for costs in shown)


def test_the_same_stored_steps_have_other_targets_when_the_discount_has_moved() -> None:
    reward = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    memory = ReplayMemory(10, "transition", ahead=2)
    memory.add(
        Rollout.create(
            task="t", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 4, dtype=torch.bool), reward=reward,
            observations=torch.zeros(1, 4, 1), step_columns={"next_observations": torch.ones(1, 4, 1)},
        )
    )  # fmt: skip
    drawn = memory.last(4)[:1]
    found = {}
    for discount in (0.5, 0.9):
        ahead = look_ahead(Batch(drawn, {}, {"discount": discount}, torch.Generator()), "test", 3, discount)
        found[discount] = (float(ahead.total[0]), float(ahead.factor[0]))
    assert found[0.5] == pytest.approx((2.75, 0.125))
    assert found[0.9] == pytest.approx((1 + 0.9 * 2 + 0.81 * 3, 0.729))


def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 9:
            raise Interrupted

    train(imitation(14), out=tmp_path / "whole", listener=quiet)
    with pytest.raises(Interrupted):
        train(imitation(14), out=tmp_path / "cut", listener=stop, checkpoint_every=4)
    train(imitation(14), out=tmp_path / "cut", resume=True, listener=quiet)
    whole, cut = (
        [
            (record["step"], record["samples"], record["metrics"])
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut


# What a controller needs


def test_a_controller_that_only_looks_at_a_probe_needs_no_update() -> None:
    regimen = imitation(1)
    assert regimen.stages[0].controllers[0].needs.update is None
    assert "discount" in regimen.stages[0].board(regimen.cast, {})


def test_losses_and_gradients_need_an_update() -> None:
    regimen = imitation(1)
    moving = regimen.stages[0].controllers[0]
    moving.needs = replace(moving.needs, losses=("dqn",))
    with pytest.raises(ValueError, match="needs losses or the gradient of a probe, and names no update"):
        regimen.stages[0].board(regimen.cast, {})
    moving.needs = Needs(probe=replace(moving.needs.probe, objective=DQNObjective()))
    with pytest.raises(ValueError, match="needs losses or the gradient of a probe, and names no update"):
        regimen.stages[0].board(regimen.cast, {})


# Texts


class ThreeWords(TextPromptTask):
    """Answers of three words, and those that ended early are asked again."""

    def __init__(self, name: str) -> None:
        super().__init__(name, [{"question": "go"}], group_size=1)

    def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Rollout:
        rollout = super().collect(cast, knobs, rng, 4 * size)
        return rollout[rollout.loss_mask.sum(1) == 3][:size]


def test_the_discount_of_a_language_models_answers_grows_with_what_they_go_through() -> None:
    """Demonstrations are sequences of token features; the discount is that of GAE, for texts record none."""
    tokenizer = word_tokenizer(["go", "left", "right", "up"])
    torch.manual_seed(0)
    policy = TokenPolicy(small_decoder(len(tokenizer), dim=16, layers=1, heads=2), tokenizer, max_new_tokens=3)
    features = torch.eye(len(tokenizer))
    spoken = torch.tensor(tokenizer.encode("left right up", add_special_tokens=False))
    shown = FrameCosts([features[spoken]], "euclidean", lambda rollout: features[rollout.actions.clamp(min=0)])
    probe = Probe(ThreeWords("probe"), 8, evaluating=True)
    moving = AutomaticDiscountScheduler(shown, probe, every=2, threshold=1.0, max_progress_delta=1, progress_start=0.4)
    discount = Knob("discount", 0.99, 0.0, 1.0)
    stage = Stage(
        "imitate", [ThreeWords("drive")], 25, 16, reward=OptimalTransportReward(shown, scale=3.0),
        credit=GAE(1.0, reads="policy", discount=discount),
        updates=[Update(ppo(reads="policy"), ["policy", "critic"], 1e-2)],
        controllers=[moving], knobs={"discount": moving.discount},
    )  # fmt: skip
    cast = Cast(policy=policy, critic=ValueHead(16))
    train(Regimen(cast, [stage], evaluations=[]), listener=quiet)
    assert moving.progress == 3
    assert moving.discount == pytest.approx(0.2 ** (1 / 3))
