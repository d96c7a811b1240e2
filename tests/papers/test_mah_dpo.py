"""MAH-DPO: its smoke test, what arms share, its verdict by hand, heads of an action policy, and real answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import tiny_language_models as tiny
from regimen import check, papers
from regimen.cast import Cast
from regimen.credit import PairsPerObjective
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import train
from regimen.models import DictTorso, LinearHeads, MLPTorso, MultiHead
from regimen.objectives import DPOObjective
from regimen.papers.mah_dpo import (
    OBJECTIVES,
    PAPER,
    SWEEP,
    Settings,
    balance,
    decoding,
    guided,
    heads,
    monotone,
    one_head,
    own_head,
    start,
    worst_gain,
)
from regimen.policies import ActionPolicy, CategoricalHead
from regimen.progress import Event
from regimen.regimen import Regimen, Stage
from regimen.rewards import FunctionReward
from regimen.rollout import Rollout
from regimen.tasks import PromptTask
from regimen.update import Epochs, Update

QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(
    QUICK, sft_steps=2, rounds=1, prompts=80, pairs=10, minibatches=2, evaluated=100, controlled=100, value_steps=1
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, all of it."""
    out = tmp_path_factory.mktemp("mah-dpo") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def test_every_arm_is_trained_evaluated_and_claimed_about(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == ["start", "mixed", "heads", "guided"]
    final = results["arms"]["heads"]["0"]["final"]
    assert {f"answers/{name}" for name in OBJECTIVES} | {f"head_{name}/warm" for name in OBJECTIVES} <= final.keys()
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in PAPER.claims]


def test_arms_spend_the_same(quick: Path) -> None:
    """As many samples and gradient steps, with one head or several."""
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name in ("mixed", "heads"):
        assert arms[name]["samples"] == 2 * QUICK.rounds * QUICK.prompts
        assert arms[name]["gradient_steps"] == QUICK.sft_steps + QUICK.rounds * QUICK.epochs * QUICK.minibatches


def last_step(regimen: Regimen) -> Mapping[str, float]:
    """Train, and what the last step told."""
    told: list[Event] = []
    train(regimen, seed=0, listener=told.append)
    return [event.metrics for event in told if event.kind == "step"][-1]


# What arms share


def first_pairs(regimen: Regimen) -> Rollout:
    """The pairs of a regimen's first round."""
    memory = regimen.stages[0].memory()  # type: ignore[operator]
    stage = dataclasses.replace(regimen.stages[0], memory=memory, steps=1)
    train(Regimen(regimen.cast, [stage], evaluations=[]), seed=3, listener=lambda event: None)
    return memory.newest()


def test_one_head_and_many_learn_from_the_same_pairs() -> None:
    ours, theirs, alone = (
        first_pairs(build(5, TINY)) for build in (heads, partial(one_head, OBJECTIVES), partial(one_head, ["warm"]))
    )
    assert torch.equal(ours.actions, theirs.actions)
    assert torch.equal(ours["rejected"]["actions"], theirs["rejected"]["actions"])
    assert torch.bincount(ours["objective"]).tolist() == [10, 10, 10]
    assert torch.equal(alone.actions, ours.actions[10:20])
    for name, better in (("correct", ours["objective"] == 0), ("warm", ours["objective"] == 1)):
        assert bool((ours.rewards[name] > ours["rejected"]["rewards", name])[better].all())


def test_every_arm_starts_where_the_common_start_ended() -> None:
    """At the first gradient step every margin is 0: each head is the start, and the start is the reference."""
    regimen = heads(2, dataclasses.replace(TINY, minibatches=1))
    before = Cast(policy=regimen.cast["policy"].reference())
    with torch.no_grad():
        for weight in before["policy"].parameters():
            weight.mul_(1.3)
    regimen.cast.load_state_dict(before.state_dict())
    metrics = last_step(regimen)
    assert metrics["aligned/loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["aligned/preference_margin/2"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("build", [start, heads, partial(one_head, OBJECTIVES), partial(one_head, ["short"]), guided])
def test_every_arms_regimen_passes_the_checks(build: Any) -> None:
    assert check(build(0, TINY)).messages == []


def test_the_default_settings_are_those_of_the_page() -> None:
    s = Settings()
    assert PAPER.scales["default"] == s
    assert (s.rounds * s.pairs * 3, s.rounds * s.epochs * s.minibatches) == (12_000, 300)
    assert (s.beta, s.rate, s.sft_steps, s.sft_batch, s.evaluated, s.controlled) == (0.1, 1e-3, 600, 128, 2000, 500)
    assert (s.candidates, s.value_discount, s.set_apart) == (5, 0.9, 20)
    for arm in (heads, partial(one_head, OBJECTIVES)):
        (stage,) = arm(0, TINY).stages
        (update,) = stage.updates
        objective = update.objective
        assert (objective.beta, objective.variant, objective.group_by, objective.group_shares) == (
            0.1, "sigmoid", "objective", None,
        )  # fmt: skip
        assert (objective.reference, objective.recorded, objective.label_smoothing) == ("policy", "logprobs", 0.0)
        assert (update.optimizer, update.max_grad_norm, stage.credit.min_gap) == (torch.optim.AdamW, 1.0, 0.0)
    full = PAPER.scales["full"]
    assert (full.beta, full.rate, 3 * full.pairs, full.longest) == (0.1, 5e-7, 30, 768)


def test_the_process_reward_model_never_sees_the_questions_it_is_tried_on() -> None:
    regimen = guided(0, TINY)
    known = set(regimen.stages[0].tasks[0].rows["question"].tolist())
    for task in regimen.evaluations or ():
        assert not known & set(task.rows["question"].tolist())
    assert len(known) == 80


# What is claimed


def result(**final: float) -> ArmResult:
    metrics = {name.replace("__", "/"): value for name, value in final.items()}
    return ArmResult([{"stage": "prefer", "metrics": metrics}], 0, 0, 0, 0.0)


def test_claims_by_hand() -> None:
    swept = {f"sweep_{i}__short": float(i) for i in range(SWEEP)} | {
        f"sweep_{i}__warm": -float(i) for i in range(SWEEP)
    }
    swept |= {"sweep_3__short": 4.5, "head_correct__warm": 0.1, "head_warm__warm": 0.6, "head_short__warm": 0.2}
    seed = {
        "start": result(answers__correct=0.6, answers__warm=0.2, answers__short=-0.4),
        "mixed": result(answers__correct=0.9, answers__warm=0.5, answers__short=-0.7),
        "heads": result(answers__correct=0.8, answers__warm=0.25, answers__short=-0.3, **swept),
        "guided": result(start_guided__correct=0.9, start_plain__correct=0.6),
    }
    assert worst_gain("heads", seed) == pytest.approx(0.05)
    assert worst_gain("mixed", seed) == pytest.approx(-0.3)
    assert balance("heads", "mixed", seed) == pytest.approx(0.35)
    assert own_head("warm", seed) == pytest.approx(0.4)
    assert monotone(seed) == pytest.approx(1 - 6 * 2 / (11 * 120))
    assert decoding("start_guided", "start_plain", seed) == pytest.approx(0.3)
    assert [(claim.name, claim.above) for claim in PAPER.claims if claim.judged] == [("balance", 0), ("all_improve", 0)]
    assert PAPER.method == "heads"


# Heads of an action policy


def vector_reward() -> list[FunctionReward]:
    """Of four actions, the first pleases one objective and the last the other."""
    return [
        FunctionReward(lambda rollout: -rollout.actions[:, 0].float(), "low"),
        FunctionReward(lambda rollout: rollout.actions[:, 0].float(), "high"),
    ]


class Tagged(PairsPerObjective):
    """Pairs whose objective an action policy is told as the condition that it observes."""

    def __call__(self, *args: Any) -> Rollout:
        pairs = super().__call__(*args)
        condition = torch.nn.functional.one_hot(pairs["objective"], 2).float()[:, None]
        rejected = pairs["rejected"].copy()
        rejected["observations"] = rejected["observations"].clone().set("condition", condition)
        observations = pairs.observations.clone().set("condition", condition)
        return pairs.replace(observations=observations).with_columns(rejected=rejected)


@pytest.mark.parametrize("kind", ["linear", "any"])
def test_heads_of_an_action_policy_learn_their_objectives_and_mix(kind: str) -> None:
    """The same pairs, objective and mixtures train a controller whose heads are told by what it observes."""
    torch.manual_seed(0)
    torso = DictTorso({"state": MLPTorso(3, (16,)), "condition": MLPTorso(2, ())})
    if kind == "linear":
        head: torch.nn.Module = CategoricalHead(16, 4)
        head.logits = LinearHeads(head.logits, ["low", "high"])
    else:
        head = MultiHead([CategoricalHead(16, 4), CategoricalHead(16, 4)])
    policy = ActionPolicy(torso, head)
    equal = torch.full((8, 2), 0.5)
    states = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    seen = TensorDict({"state": states, "condition": equal}, batch_size=[8])
    rows = TensorDict({"observation": seen}, batch_size=[8])
    first, second = vector_reward()
    objective = DPOObjective(1.0, reference=None, group_by="objective")
    stage = Stage(
        "prefer", [PromptTask("act", rows, group_size=4)], 20, 64, reward=first + second,
        credit=Tagged(["low", "high"]),
        updates=[Update(objective, learning_rate=2e-2, batches=Epochs(2))],
    )  # fmt: skip
    train(Regimen(Cast(policy=policy), [stage]), seed=0, listener=lambda event: None)

    def mean(*weights: float) -> float:
        seen = TensorDict({"state": states, "condition": torch.tensor(weights).expand(8, 2)}, batch_size=[8])
        described = policy.head(policy.torso(seen), 1.0)
        return float((described.logits.detach().softmax(-1) @ torch.arange(4.0)).mean())

    assert mean(1, 0) < 0.7
    assert mean(0, 1) > 2.3
    sweep = [mean(1 - share, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sweep == sorted(sweep)


# Real answers


def test_the_path_to_rated_answers(tmp_path: Path) -> None:
    """A model from a folder, answers in UltraFeedback's form: every step has pairs of each objective."""
    tiny.save(tmp_path / "model", tiny.language_model("qwen2"), tiny.tokenizer())
    rating = lambda *values: {  # noqa: E731
        name: {"Rating": str(value)}
        for name, value in zip(("helpfulness", "honesty", "truthfulness"), values, strict=True)
    }
    record = {
        "instruction": "the cat sat on the",
        "completions": [
            {"response": "mat", "annotations": rating(5, 1, 3)},
            {"response": "hat", "annotations": rating(2, 4, 1)},
        ],
    }
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for _ in range(10)))
    settings = dataclasses.replace(
        PAPER.scales["full"], model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), device="cpu", rounds=3,
        pairs=2, longest=40, rate=1e-3,
    )  # fmt: skip
    regimen = heads(0, settings)
    assert [task.name for task in regimen.stages[0].tasks] == ["helpfulness", "honesty", "truthfulness"]
    metrics = last_step(regimen)
    assert {f"aligned/preference_accuracy/{place}" for place in range(3)} <= metrics.keys()
    (held_out,) = regimen.evaluations or ()
    assert {"helpfulness", "honesty", "truthfulness"} == held_out.evaluate(
        regimen.cast, {}, torch.Generator()
    ).metrics.keys()
    common = train(start(0, settings), seed=0)
    assert common.evaluations[-1]["metrics"] == {
        f"answers/{name}": 0.5 for name in ("helpfulness", "honesty", "truthfulness")
    }
    assert "aligned/preference_accuracy/2" in last_step(one_head(OBJECTIVES, 0, settings))
    with pytest.raises(ValueError, match="arm 'guided' needs answers that a rule calls right"):
        guided(0, settings)
    with pytest.raises(ValueError, match="leave the arms only_... out"):
        one_head(["warm"], 0, settings)
