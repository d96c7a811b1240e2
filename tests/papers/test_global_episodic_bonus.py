"""Global and episodic bonuses: the smoke test, the learner's arithmetic, what is seen and counted, and the claims."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen import papers
from regimen.cast import Cast
from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage
from regimen.iteration import Counters, StageRun
from regimen.knobs import Knobs
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.lab.statistics import judge_claim, verdict
from regimen.loop import Outcome, train
from regimen.objectives import ClippedSurrogateObjective
from regimen.papers.global_episodic_bonus import (
    BONUSES,
    PAPER,
    PLACES,
    Settings,
    explored,
    minigrid,
    tables,
    tabular,
)
from regimen.policies import FlowPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import CountBonus, EllipticalBonus, Expression, NormalizedReward, Scene, judge, row_key
from regimen.rollout import Rollout
from regimen.tasks import PromptTask
from regimen.update import Update

QUICK = PAPER.scales["quick"]
TINY = dataclasses.replace(QUICK, corridor_steps=6, maze_steps=2)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of scale quick, all of it."""
    out = tmp_path_factory.mktemp("bonus") / "quick"
    return run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick")) and read_results(out)


def weights(outcome: Outcome, *names: str) -> list[Tensor]:
    return [p.detach().clone() for name in names for p in outcome.cast[name].parameters()]


# The smoke test


def test_every_arm_is_trained_and_every_claim_computed(quick: dict[str, Any]) -> None:
    assert quick["failures"] == []
    assert list(quick["arms"]) == [f"{place}_{bonus}" for place in PLACES for bonus in BONUSES]
    assert quick["left_out"] == []
    assert all(claim["missing"] == {} for claim in quick["claims"])


def test_arms_of_a_place_spend_the_same(quick: dict[str, Any]) -> None:
    expected = {"corridors": 30 * 16, "mazes": 6 * 32, "maze": 6 * 32}
    for arm, seeds in quick["arms"].items():
        assert seeds["0"]["samples"] == expected[arm.split("_")[0]]


def test_every_place_has_its_own_success(quick: dict[str, Any]) -> None:
    for arm, seeds in quick["arms"].items():
        place = arm.split("_")[0]
        for record in seeds["0"]["evaluations"]:
            assert 0 <= record["metrics"][f"{place}/success"] <= 1
    assert list(PAPER.metrics) == [f"{place}/success" for place in PLACES]


# Arms and settings


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bonuses", ["counts", "learned"])
def test_at_weight_zero_a_bonus_changes_nothing(place: Any, bonuses: Any) -> None:
    plain = train(explored(place, "none", 3, TINY), seed=3)
    ignored = train(explored(place, "product", 3, dataclasses.replace(TINY, beta=0.0, bonuses=bonuses)), seed=3)
    for a, b in zip(weights(plain, "policy", "critic"), weights(ignored, "policy", "critic"), strict=True):
        assert torch.equal(a, b)


def test_arms_differ_in_nothing_but_the_bonus() -> None:
    for place in PLACES:
        arms = [explored(place, bonus, 0, Settings()) for bonus in BONUSES]
        first = arms[0].stages[0]
        for arm in arms:
            stage = arm.stages[0]
            assert (stage.steps, stage.batch_size, stage.credit) == (first.steps, first.batch_size, first.credit)
            assert [u.learning_rate for u in stage.updates] == [u.learning_rate for u in first.updates] == [2.0, 1.0]
            assert all(not bool(p.any()) for p in arm.cast["policy"].parameters())
            board = stage.board(arm.cast, {})
            assert board.get("weight/bonus", 0.1) == 0.1
            assert board.for_evaluation()["temperature"] == board["temperature"] == 1


def test_the_default_settings_are_those_that_the_experiment_fixes() -> None:
    s = Settings()
    assert PAPER.scales["default"] == s
    assert (s.beta, s.learning_rate, s.discount, s.contexts) == (0.1, 2.0, 0.99, 400)
    assert (s.corridor_steps, s.corridor_batch, s.corridor_entropy) == (250, 16, 0.01)
    assert (s.maze_steps, s.maze_batch, s.maze_entropy) == (150, 32, 0.002)
    assert PAPER.scales["learned"] == dataclasses.replace(s, bonuses="learned")
    assert PAPER.requires == {"full": "minigrid"}


def drawn(place: Any, seed: int, what: str) -> Tensor:
    """A part of the contexts of twenty episodes."""
    env: Any = tables(place, seed, TINY).task.make(1)
    contexts: Tensor = env.pool.draw(torch.arange(20))[what]
    return contexts


def test_one_goal_and_one_maze_are_drawn_by_the_seed_and_many_mazes_by_the_episode() -> None:
    goals = [drawn("corridors", seed, "goal").int().argmax(1).unique().tolist() for seed in range(8)]
    assert all(len(goal) == 1 and goal[0] in (8, 16, 24, 32, 40) for goal in goals)
    assert len({goal[0] for goal in goals}) > 1
    assert len(drawn("maze", 0, "onward").unique(dim=0)) == 1
    assert 5 < len(drawn("mazes", 0, "onward").unique(dim=0)) <= TINY.contexts
    assert not torch.equal(drawn("maze", 0, "onward"), drawn("maze", 1, "onward"))


def test_an_evaluation_draws_from_the_contexts_of_training() -> None:
    assert torch.equal(drawn("mazes", 0, "onward"), drawn("mazes", 0, "onward"))


def test_an_evaluation_has_the_episodes_of_twenty_iterations() -> None:
    assert tables("corridors", 0, Settings()).task.evaluation_episodes == 320
    assert tables("maze", 0, Settings()).task.evaluation_episodes == 640


# What is seen, and what is counted


def test_the_policy_does_not_see_the_cell_of_a_maze() -> None:
    learner = tabular(tables("maze", 0, TINY), TINY)
    seen = TensorDict({"sight": torch.tensor([7, 7]), "cell": torch.tensor([0, 35])}, [2])
    features = learner.policy.torso(seen)
    assert features.shape == (2, 80)
    assert torch.equal(features[0], features[1])


def test_a_cell_counts_as_one_in_all_mazes() -> None:
    seen = TensorDict({"sight": torch.tensor([7, 12]), "cell": torch.tensor([4, 4])}, [2])
    key = tables("mazes", 0, TINY).key(seen)
    assert key[0] == key[1]


def test_the_bonus_of_a_maze_is_of_the_cell_that_a_step_led_to() -> None:
    arm = explored("mazes", "product", 0, TINY)
    task, cast = arm.stages[0].tasks[0], arm.cast
    rollout = task.collect(cast, Knobs.of(cast["policy"], task), torch.Generator().manual_seed(0), 32)
    key = tables("mazes", 0, TINY).key
    bonus = CountBonus("episodic", key, form="first") * CountBonus("global", key)
    judged, _ = judge(bonus, rollout, Scene({}, {knob.name: 1.0 for knob in bonus.knobs}))
    visits, told = Counter({0: 32}), judged.reward
    fresh = [{0} for _ in range(32)]
    for step in range(rollout.steps):
        for row in range(32):
            if rollout.mask[row, step]:
                where = int(rollout["next_cell"][row, step])
                visits[where] += 1
                expected = 0.0 if where in fresh[row] else visits[where] ** -0.5
                assert float(told[row, step]) == pytest.approx(expected)
                fresh[row].add(where)


# The learner


def test_an_update_is_the_policy_gradient_per_episode_and_the_baseline_moves_by_the_share_of_steps() -> None:
    arm = explored("corridors", "global", 0, dataclasses.replace(Settings(), corridor_steps=1))
    run, kept = StageRun(arm, arm.stages[0]), []
    run.start(fresh=True)
    credit: Any = arm.stages[0].credit
    run.stage.credit = lambda *given: kept.append(credit(*given)) or kept[-1]
    # Entropy is largest where the table starts, so its gradient is 0 there.
    run.iterate(0, Counters(), torch.Generator().manual_seed(1))
    (rollout,) = kept
    table, values, steps = torch.zeros(5, 41), torch.zeros(41), float(rollout.mask.sum())
    for row in range(16):
        gain = 0.0
        for step in reversed(range(int(rollout.lengths[row]))):
            gain = float(rollout.reward[row, step]) + 0.99 * gain
            seen, action = int(rollout.observations[row, step]), int(rollout.actions[row, step])
            score = -torch.full((5,), 0.2)
            score[action] += 1
            table[:, seen] += 2.0 / 16 * gain * score
            values[seen] += gain / steps
    assert torch.allclose(arm.cast["policy"].head.logits.weight, table, atol=1e-5)
    assert torch.allclose(arm.cast["critic"].layer.weight[0], values, atol=1e-5)
    assert not bool(arm.cast["policy"].head.logits.bias.any() | arm.cast["critic"].layer.bias.any())


def test_an_update_takes_off_the_baseline_and_raises_the_entropy() -> None:
    """From any tables: `lr / episodes` times the gradient of `(G - V) log pi + weight H`, summed over steps."""
    s = dataclasses.replace(Settings(), corridor_steps=1, corridor_entropy=0.3)
    arm = explored("corridors", "product", 0, s)
    rng, kept = torch.Generator().manual_seed(5), []
    table, values = arm.cast["policy"].head.logits.weight, arm.cast["critic"].layer.weight
    table.data, values.data = torch.randn(5, 41, generator=rng), torch.randn(1, 41, generator=rng)
    before, value = table.detach().clone().requires_grad_(), values.detach()[0].clone()
    run, credit = StageRun(arm, arm.stages[0]), arm.stages[0].credit
    run.start(fresh=True)
    run.stage.credit = lambda *given: kept.append(credit(*given)) or kept[-1]
    run.iterate(0, Counters(), torch.Generator().manual_seed(1))
    (rollout,) = kept
    gain, gains = torch.zeros(16), torch.zeros(rollout.mask.shape)
    for step in reversed(range(rollout.steps)):
        gain = gains[:, step] = torch.where(rollout.mask[:, step], rollout.reward[:, step] + 0.99 * gain, 0)
    seen, there = rollout.observations, rollout.mask
    logits = before.T.log_softmax(1)
    entropy = -(logits.exp() * logits).sum(1)[seen]
    taken = logits[seen, rollout.actions.clamp(min=0)]
    aim = torch.where(there, (gains - value[seen]) * taken + 0.3 * entropy, 0).sum() / 16
    (slope,) = torch.autograd.grad(aim, [before])
    assert torch.allclose(table, before + 2 * slope, atol=1e-4)
    moved = torch.zeros(41).index_add_(0, seen[there], (gains - value[seen])[there]) / there.sum()
    assert torch.allclose(values[0], value + moved, atol=1e-4)


def test_no_value_is_expected_after_the_last_step_of_an_episode() -> None:
    arm = explored("corridors", "none", 0, TINY)
    task = arm.stages[0].tasks[0]
    rollout = task.collect(arm.cast, Knobs.of(arm.cast["policy"], task), torch.Generator().manual_seed(0), 16)
    assert not bool(rollout["cut"].any())
    assert rollout.discount[:, 9].tolist() == [0.0] * 16


def test_a_global_bonus_finds_the_end_of_a_corridor_that_chance_does_not() -> None:
    outcome = train(explored("corridors", "global", 100, dataclasses.replace(Settings(), corridor_steps=150)), seed=100)
    before, after = (outcome.evaluations[place]["metrics"]["corridors/success"] for place in (0, -1))
    assert before < 0.05
    assert after > 0.5


@pytest.mark.parametrize("bonuses", ["counts", "learned"])
def test_regimens_pass_the_checks(bonuses: Any) -> None:
    assert check(explored("mazes", "product", 0, dataclasses.replace(TINY, bonuses=bonuses))).messages == []


def test_learned_bonuses_train_their_members_and_no_others() -> None:
    s = dataclasses.replace(TINY, bonuses="learned")
    before = {name: [p.clone() for p in explored("mazes", "product", 0, s).cast[name].parameters()]
              for name in ("bonus_encoder", "inverse_dynamics", "bonus_predictor", "bonus_target")}  # fmt: skip
    outcome = train(explored("mazes", "product", 0, s), seed=0)
    for name, old in before.items():
        same = all(torch.equal(a, b) for a, b in zip(old, weights(outcome, name), strict=True))
        assert same == (name == "bonus_target")
    assert set(explored("mazes", "episodic", 0, s).cast) == {"policy", "critic", "bonus_encoder", "inverse_dynamics"}


# Claims


def results(**success: float) -> dict[str, ArmResult]:
    """A made-up seed; arms are 0.5 unless given."""

    def arm(place: str, value: float) -> ArmResult:
        record: Mapping[str, Any] = {"stage": "explore", "step": 1, "metrics": {f"{place}/success": value}}
        return ArmResult([record], samples=0, rows=0, gradient_steps=0, seconds=0.0)

    return {
        f"{place}_{bonus}": arm(place, success.get(f"{place}_{bonus}", 0.5)) for place in PLACES for bonus in BONUSES
    }


def value(name: str, **success: float) -> float:
    return next(claim for claim in PAPER.claims if claim.name == name).value(results(**success))


def test_leads_are_differences_of_success() -> None:
    assert value("global_leads", corridors_global=0.9, corridors_episodic=0.2) == pytest.approx(0.7)
    assert value("episodic_leads", mazes_global=0.3, mazes_episodic=0.8) == pytest.approx(0.5)
    assert value("maze_lead", maze_global=0.6, maze_episodic=0.9) == pytest.approx(0.3)
    assert value("mazes_gain", mazes_product=0.9, mazes_none=0.7) == pytest.approx(0.2)


def test_the_lead_shrinks_by_what_it_loses_in_one_maze() -> None:
    many = {"mazes_episodic": 0.9, "mazes_global": 0.3}
    assert value("lead_shrinks", **many, maze_episodic=0.9, maze_global=0.7) == pytest.approx(0.4)
    assert value("lead_shrinks", **many, maze_episodic=1.0, maze_global=0.2) == pytest.approx(-0.2)


@pytest.mark.parametrize("place", PLACES)
def test_the_product_is_compared_with_the_better_factor_of_each_seed(place: str) -> None:
    arms = {f"{place}_product": 0.8}
    assert value(f"product_{place}", **arms, **{f"{place}_episodic": 0.85}) == pytest.approx(-0.05)
    assert value(f"product_{place}", **arms, **{f"{place}_global": 1.0}) == pytest.approx(-0.2)


def test_the_verdict_needs_all_six_judged_claims() -> None:
    judged = [claim.name for claim in PAPER.claims if claim.judged]
    places = [f"product_{place}" for place in PLACES]
    assert judged == ["global_leads", "episodic_leads", "lead_shrinks", *places]
    good = {"corridors_global": 1.0, "corridors_product": 1.0, "mazes_episodic": 0.9, "mazes_product": 0.9}

    def found(**success: float) -> str:
        seeds = {i: results(**{name: share + 0.001 * i for name, share in success.items()}) for i in range(5)}
        return verdict([judge_claim(claim, range(5), seeds) for claim in PAPER.claims if claim.judged])

    assert found(**good) == "holds"
    assert found(**{**good, "maze_product": 0.3}) == "does not hold"


# The bonuses on another kind of policy


class Denoised(PromptTask):
    """Samples of a flow policy, whose states are the images that it passes through."""

    def collect(self, *given: Any) -> Rollout:
        rollout = super().collect(*given)
        return rollout.with_step_columns(next_observations=rollout.actions)


def pattern(images: Any) -> Tensor:
    """Which pixels are bright."""
    return row_key((images > 0).long())


def test_images_that_a_flow_policy_makes_are_counted(
    tiny_policy: Callable[..., FlowPolicy], contexts: Callable[[int], TensorDict]
) -> None:
    task, policy = Denoised("images", contexts(2), group_size=4), tiny_policy()
    rollout = task.collect({"policy": policy}, Knobs.of(policy), torch.Generator().manual_seed(0), 8)
    judged, report = judge(CountBonus("global", pattern), rollout, Scene({}, {"weight/global_count": 1.0}))
    assert report.errors == ()
    visits: Counter[Any] = Counter(tuple((image > 0).flatten().tolist()) for image in rollout.observations[:, 0])
    for step in range(rollout.steps):
        for row in range(8):
            key = tuple((rollout.actions[row, step] > 0).flatten().tolist())
            visits[key] += 1
            assert float(judged.reward[row, step]) == pytest.approx(visits[key] ** -0.5)


def test_a_flow_policy_learns_from_an_elliptical_bonus_on_image_features(
    tiny_policy: Callable[..., FlowPolicy], contexts: Callable[[int], TensorDict]
) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).requires_grad_(False)
    bonus: Expression = EllipticalBonus() * CountBonus("global", pattern)
    stage = Stage(
        "explore",
        [Denoised("images", contexts(2), group_size=8)],
        steps=3,
        batch_size=16,
        reward=0.1 * NormalizedReward(bonus, name="bonus"),
        credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective(), learning_rate=1e-3)],
    )
    policy = tiny_policy()
    before = [p.clone() for p in policy.parameters()]
    outcome = train(Regimen(Cast(policy=policy, bonus_encoder=encoder), [stage], evaluations=[]), seed=0)
    assert outcome.counters.skipped == 0
    assert outcome.counters.gradient_steps == 3
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(outcome, "policy"), strict=True))


# The real environments


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rooms_of_minigrid_are_explored_by_a_policy_with_memory(tmp_path: Path) -> None:
    pytest.importorskip("minigrid")
    s = dataclasses.replace(
        PAPER.scales["full"], device="cpu", rooms_steps=2, copies=4, segment=16, hidden=8, features=8,
        few_rooms="MiniGrid-MultiRoom-N2-S4-v0", many_rooms="MiniGrid-MultiRoom-N2-S4-v0",
    )  # fmt: skip
    arm = explored("maze", "product", 0, s)
    before = [p.clone() for p in arm.cast["policy"].parameters()]
    outcome = train(arm, seed=0, out=tmp_path)
    assert outcome.counters.samples == 8
    assert outcome.counters.skipped == 0
    assert 0 <= outcome.evaluations[-1]["metrics"]["maze/success"] <= 1
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(outcome, "policy"), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_arms_of_minigrid_fit_together() -> None:
    """Every bonus in many rooms, and the product in every place."""
    pytest.importorskip("minigrid")
    s = dataclasses.replace(PAPER.scales["full"], device="cpu", copies=1, hidden=8, features=8)
    for arm in PAPER.arms:
        place, bonus = arm.name.split("_")
        if place != "mazes" and bonus != "product":
            continue
        regimen = arm.build(0, s)
        (stage,) = regimen.stages
        assert regimen.evaluated() == [stage.tasks[0]]
        assert len(stage.updates) == {"none": 1, "episodic": 2, "global": 2, "product": 3}[bonus]
        assert stage.tasks[0].name == place


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_room_is_the_same_level_and_many_are_not() -> None:
    pytest.importorskip("minigrid")
    s = dataclasses.replace(PAPER.scales["full"], copies=4, many_rooms="MiniGrid-MultiRoom-N2-S4-v0")
    for place, levels in (("maze", {1}), ("mazes", {2, 3, 4})):
        env: Any = minigrid(place, 0, s).task.make(4)
        env.reset(torch.ones(4, dtype=torch.bool), torch.arange(4), {})
        assert len({copy.unwrapped.grid.encode().tobytes() for copy in env._env.envs}) in levels
