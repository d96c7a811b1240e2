"""Meta-World: the smoke test, what arms differ in, equal steps per task, held-out goals, and the options."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from regimen import papers
from regimen.functions.gradients import pcgrad
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import train
from regimen.regimen import Regimen
from regimen.rewards import EnvironmentReward, NormalizedReward
from regimen.rewards.base import Scene
from regimen.rewards.judge import judge
from regimen.rollout import Rollout
from regimen.runs import read_metrics

pytest.importorskip("metaworld")

from regimen.papers.meta_world import PAPER, Settings, Sharing, gain, imitated, members, reinforced, training, trial

QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(QUICK, horizon=20, steps=1, copies=1, segment=30, epochs=1, episodes=1, widths=(8,))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick."""
    out = tmp_path_factory.mktemp("meta-world") / "quick"
    run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def trained(regimen: Regimen, out: Path | None = None) -> dict[str, float]:
    found: dict[str, float] = train(regimen, out=out, listener=lambda event: None).evaluations[-1]["metrics"]
    return found


def test_every_arm_is_trained_with_as_many_samples_and_every_claim_computed(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert sorted(results["arms"]) == ["all", "nothing", "trunk"]
    assert all(claim["missing"] == {} for claim in results["claims"])
    spent = [results["arms"][arm]["0"] for arm in ("all", "nothing", "trunk")]
    # Two iterations, in each two stretches of each of two tasks.
    assert [(each["samples"], each["gradient_steps"]) for each in spent] == [(8, 16)] * 3


def test_arms_differ_in_what_tasks_share() -> None:
    s = Settings()

    def weights(sharing: Sharing, widths: tuple[int, ...] = s.widths) -> int:
        return sum(p.numel() for p in members(sharing, 3, widths, 0, s)[0].parameters())

    one = weights("all")
    assert weights("nothing") == 3 * one
    assert weights("trunk") == one + 2 * (64 * 4 + 4 + 4)
    assert weights("all", s.wide) == pytest.approx(3 * one, rel=0.02)


def test_every_task_gives_as_many_steps_with_goals_that_are_not_tried() -> None:
    task = training(0, TINY)
    policy, _ = members("all", 2, TINY.widths, 0, TINY)
    knobs = {"temperature": 1.0, "discount": 0.99}
    rollout = task.collect({"policy": policy}, knobs, torch.Generator().manual_seed(0), 2)
    assert rollout.task_names == TINY.tasks
    assert [int(rollout.mask[rollout.task == place].sum()) for place in (0, 1)] == [30, 30]
    tried = [each.make.goals for each in trial(TINY.tasks, 0, TINY).tasks]
    assert [each.make.goals for each in task.tasks] == [(0, 40)] * 2
    assert tried == [(40, 50)] * 2
    again = trial(TINY.tasks, 0, dataclasses.replace(TINY, known=50))
    assert again.tasks[0].make.goals == (0, 50)


def test_claims_are_differences_of_the_mean_over_tasks() -> None:
    seed = {
        arm: ArmResult([{"stage": "s", "metrics": {"trial/success": rate}}], 1, 0, 1, 1.0)
        for arm, rate in {"nothing": 0.75, "all": 0.5}.items()
    }
    assert gain("nothing", "all", seed) == 0.25


@pytest.mark.parametrize("center", [False, True])
def test_scaling_the_reward_of_one_task_leaves_what_is_learned_from_unchanged(center: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 8, generator=rng) for _ in range(2))

    def normalized(scale: float) -> torch.Tensor:
        reward = NormalizedReward(EnvironmentReward(), center=center, per="task")
        rollout = Rollout.cat([
            Rollout.create(task=name, group=torch.zeros(3).long(), mask=torch.ones(3, 8).bool(), step_columns=columns)
            for name, columns in (("a", {"env_reward": scale * one}), ("b", {"env_reward": other}))
        ])  # fmt: skip
        judged, _ = judge(reward, rollout, Scene({}, {knob.name: knob.default for knob in reward.knobs}))
        assert judged.reward is not None
        return judged.reward

    assert torch.allclose(normalized(1.0), normalized(100.0), atol=1e-5)


def test_pcgrad_learns_from_tasks_apart(tmp_path: Path) -> None:
    found = trained(reinforced("all", 0, TINY, gradients=pcgrad), tmp_path)
    assert {f"trial/{name}/success" for name in TINY.tasks} <= found.keys()
    logged = read_metrics(tmp_path / "metrics.jsonl")
    conflicts = [m["metrics"]["policy+critic/gradient_conflict"] for m in logged if m["kind"] == "step"]
    assert all(0 <= share <= 1 for share in conflicts)
    assert len(conflicts) == 1


def test_the_companion_imitates_experts() -> None:
    s = dataclasses.replace(TINY, imitated=TINY.tasks, demonstrations=2, horizon=110, imitation_epochs=40, widths=(64,))
    found = trained(imitated("trunk", 0, dataclasses.replace(s, episodes=2)))
    assert found["trial/drawer-close-v3/success"] > 0


def test_the_full_scale_collects_in_processes() -> None:
    full: Settings = PAPER.scales["full"]
    assert full.names == papers_mt10()
    small = dataclasses.replace(TINY, benchmark="MT1", known=full.known, workers=1)
    assert 0 <= trained(reinforced("nothing", 0, small))["trial/success"] <= 1


def papers_mt10() -> tuple[str, ...]:
    from regimen.tasks.environments.metaworld import tasks_of

    return tasks_of("MT10")
