"""Our own parts pass the checkers that users' parts are given."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers import StandInPolicy, check, stand_in_rollout
from regimen.checkers.dispatch import interface_of
from regimen.controllers import Alternating, Constant, Exponential, Linear, Piecewise, Schedule, Steps
from regimen.credit import GroupRelativeAdvantage
from regimen.credit.gae import GAE
from regimen.credit.n_step import NStepReturn
from regimen.credit.pairs import BestWorstPairSelector
from regimen.knobs import Knob, Knobs
from regimen.models import small_decoder, word_tokenizer
from regimen.objectives import (
    ClippedSurrogateObjective,
    DPOObjective,
    EntropyBonus,
    FlowMatchingObjective,
    ReferenceKL,
    ReinforceObjective,
    SFTObjective,
    ValueObjective,
    grpo,
    ppo,
)
from regimen.papers import unipic2
from regimen.policies import TokenPolicy
from regimen.rewards import ClassifierReward, EditReward, EnvironmentReward, FirstApplicable, Scene, judge, reward_from
from regimen.rewards.answers import AnswerReward
from regimen.rewards.text import LengthReward, TagFormatReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, DialogueTask, OneByOne, PromptTask
from regimen.tasks.worlds.digits import DigitsWorld, edit_target
from regimen.tasks.worlds.guess_number import GuessNumber

TESTS = Path(__file__).parents[1]
FOLDERS = ("policies", "tasks", "rewards", "credit", "objectives", "controllers")


@dataclass(frozen=True)
class Case:
    """A part, and what it is tried on if the stand-ins lack what it reads."""

    part: Any
    rollout: Rollout | None = None
    cast: dict[str, Any] | None = None


class Critic(nn.Module):
    """A value for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, rollout: Rollout) -> Tensor:
        return self.layer(rollout.observations)[..., 0]


@reward_from
def ink(rollout: Rollout) -> Tensor:
    return rollout["image"].flatten(1).mean(1)


@reward_from
def edges(rollout: Rollout) -> Tensor:
    return rollout["image"].diff(dim=-1).abs().flatten(1).mean(1)


def texts() -> Rollout:
    """The stand-in with texts, expected answers, and a reward that an environment gave."""
    said = ["<think>2 and 2</think><answer>4</answer>", "<answer>5</answer>", "4", "", "<think>x</think>", "four"]
    rollout = stand_in_rollout()
    return rollout.with_columns(text=said, answer=["4"] * 6, env_reward=rollout.mask / 2)


def with_values() -> Rollout:
    """The stand-in with what a critic said, and what it should have said."""
    rollout = stand_in_rollout()
    return rollout.with_columns(values=rollout.mask / 2, value_target=rollout.mask / 3)


def pairs() -> Rollout:
    """The best and the worst of each group."""
    rollout, _ = judge(ink, stand_in_rollout(), Scene())
    return BestWorstPairSelector()(rollout, {}, {})


def pictures(build: Callable[..., Any]) -> Case:
    """A rollout and a cast of small flow policies."""
    policy = build()
    contexts = TensorDict({"condition": torch.arange(6) % 2}, batch_size=[6])
    rollout = policy.sample(contexts, Knobs.of(policy), torch.Generator().manual_seed(0))
    return Case(None, rollout.replace(group=torch.arange(6) // 2), {"policy": policy, "reference": build(seed=1)})


def written() -> Case:
    """A small language model and its prompts."""
    tokenizer = word_tokenizer(["yes", "no", "why"])
    policy = TokenPolicy(small_decoder(len(tokenizer), dim=16, layers=1, heads=2), tokenizer, max_new_tokens=4)
    prompts, mask = ["why", "yes no", "no", "why why"], torch.ones(4, 1, dtype=torch.bool)
    return Case(policy, Rollout.create(task="ask", group=torch.arange(4), mask=mask, context={"prompt": prompts}))


def spoken() -> Case:
    """A game of questions and answers, and a small language model that plays it."""
    game = GuessNumber()
    tokenizer = word_tokenizer(game.words)
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=96)
    task = DialogueTask("game", OneByOne(game), max_turns=2, group_size=2, evaluation=range(4))
    return Case(task, cast={"policy": TokenPolicy(model, tokenizer, max_new_tokens=4)})


def drawn(world: DigitsWorld, task: PromptTask) -> Rollout:
    policy = world.policy(0)
    return task.collect({"policy": policy}, Knobs.of(policy), torch.Generator().manual_seed(0), 4)


def cases(world: DigitsWorld, tiny: Callable[..., Any]) -> dict[str, Case]:
    """A case or more for every part, by its class's name and what is special about it."""
    flow, words = pictures(tiny), texts()
    members = {"policy": StandInPolicy(0), "reference": StandInPolicy(1), "critic": Critic()}
    rows = TensorDict({"condition": torch.arange(3)}, batch_size=[3])
    table = TensorDict({"image": torch.rand(5, 1, 2, 2), "context": {"condition": torch.arange(5) % 2}}, batch_size=[5])
    generated, edited = drawn(world, world.generation(2)), drawn(world, world.editing(2))
    edit = EditReward(edit_target)
    curves = [Constant(1), Linear(1, 0, 5), Exponential(1, 0.9), Steps(1, 0.1, 2, 6), Piecewise([(0, 1.0), (3, 0.5)])]
    return {
        "FlowPolicy": replace(flow, part=tiny(), cast=None),
        "FlowPolicy, summed": replace(flow, part=tiny(logprob_reduce="sum"), cast=None),
        "TokenPolicy": written(),
        "PromptTask": Case(PromptTask("p", rows, group_size=3)),
        "PromptTask, in sequence": Case(PromptTask("p", rows, group_size=2, order="sequential")),
        "DatasetTask": replace(flow, part=DatasetTask("d", table)),
        "DialogueTask": spoken(),
        "ClassifierReward": Case(ClassifierReward(world.judge), generated),
        "EditReward": Case(edit, edited),
        "FirstApplicable": Case(FirstApplicable(edit.on("edit"), ink), edited),
        "FunctionReward": Case(ink),
        "FunctionReward, composed": Case(2 * ink.when(ink, above=0.1) - 0.1 * edges.on("beta")),
        "EnvironmentReward": Case(EnvironmentReward(), words),
        "AnswerReward": Case(AnswerReward(lambda given, wanted: given == wanted, tag="answer"), words),
        "LengthReward": Case(LengthReward(budget=3)),
        "TagFormatReward": Case(TagFormatReward(), words),
        "GroupRelativeAdvantage": Case(GroupRelativeAdvantage()),
        "GroupRelativeAdvantage, batch": Case(GroupRelativeAdvantage("batch", 0, clip=5.0)),
        "GroupRelativeAdvantage, unscaled": Case(GroupRelativeAdvantage(None)),
        "GAE": Case(GAE(normalize="task"), cast=members),
        "GAE, recorded": Case(GAE(lam=1.0), with_values()),
        "NStepReturn": Case(NStepReturn(2, Knob("discount", 0.9), bootstrap="values"), with_values()),
        "BestWorstPairSelector": Case(BestWorstPairSelector()),
        "ClippedSurrogateObjective": Case(ClippedSurrogateObjective()),
        "ClippedSurrogateObjective, flow": replace(flow, part=ClippedSurrogateObjective(1e-3)),
        "ReferenceKL": Case(ReferenceKL("exact")),
        "ReferenceKL, flow": replace(flow, part=ReferenceKL("flow_grpo")),
        "FlowMatchingObjective": replace(flow, part=FlowMatchingObjective()),
        "SFTObjective": Case(SFTObjective()),
        "EntropyBonus": Case(EntropyBonus()),
        "ReinforceObjective": Case(ReinforceObjective()),
        "ValueObjective": Case(ValueObjective(clip=0.2), with_values(), members),
        "DPOObjective": Case(DPOObjective(), pairs()),
        "SumObjective": Case(grpo() + SFTObjective()),
        "SumObjective, ppo": Case(ppo(), with_values(), members),
        "Schedule": Case(Schedule("mixture/a", Alternating(2, 0.5, 1, 0))),
        **{f"Schedule, {type(curve).__name__}": Case(Schedule("kl_weight", curve)) for curve in curves},
    }


@pytest.fixture
def ours(digits: DigitsWorld, tiny_policy: Callable[..., Any]) -> dict[str, Case]:
    return cases(digits, tiny_policy)


def test_our_parts_pass(ours: dict[str, Case]) -> None:
    found = {name: check(case.part, case.rollout, cast=case.cast).messages for name, case in ours.items()}
    assert {name: messages for name, messages in found.items() if messages} == {}


def test_every_exported_part_is_checked(ours: dict[str, Case]) -> None:
    """A new part gets a case above, or is handed to the checker by the test of its own."""
    exported = {
        name
        for folder in FOLDERS
        for name, value in vars(importlib.import_module(f"regimen.{folder}")).items()
        if inspect.isclass(value) and not inspect.isabstract(value) and not getattr(value, "_is_protocol", False)
        if interface_of(value) is not None and name != "Batch"  # It has distributions, as a policy does.
    }
    there = {name.split(",")[0] for name in ours}
    elsewhere = [text for path in TESTS.rglob("test_*.py") if "from regimen.checkers" in (text := path.read_text())]
    assert {name for name in exported - there if not any(f"{name}(" in text for text in elsewhere)} == set()


@pytest.mark.parametrize("arm", [arm.name for arm in unipic2.PAPER.arms])
def test_the_regimens_of_unipic2_pass(arm: str, digits: DigitsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unipic2.digits, "DigitsWorld", lambda seed: digits)  # Made once; it trains two classifiers.
    settings = replace(unipic2.Settings(), pretrain_steps=2, stage_steps=2, batch_size=8, group_size=4)
    assert check(unipic2.PAPER.arm(arm).build(0, settings)).messages == []
