"""Imitation Learning from Observation with Automatic Discount Scheduling (arXiv 2310.07433, ICLR 2024).

Claim: where later behaviour depends on earlier behaviour, the proxy rewards of late steps mislead a learner that has
not mastered the early ones yet. Under the usual discount of 0.99 it fails; a discount that starts small and grows with
what is recognised of the demonstrations cures it, and is no worse than the best fixed one in hindsight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.controllers import AutomaticDiscountScheduler, Controller, Probe
from regimen.credit import GAE
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import ReplayMemory
from regimen.models import FrameCosts, QNetwork, Temperature
from regimen.models.torsos import torso_for
from regimen.models.value_head import ValueHead
from regimen.objectives import ReinforceObjective, ValueObjective, sac
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import OptimalTransportReward
from regimen.rollout import Rollout
from regimen.tasks.env import EnvTask
from regimen.tasks.environments.metaworld import MetaWorld
from regimen.tasks.environments.metaworld_experts import ScriptedExpert
from regimen.tasks.environments.tensor import ProgressChain
from regimen.update import Draws, Update

World = Literal["chain", "metaworld"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same for every arm.

    Attributes:
        world: what is imitated and by whom, see `WORLDS`.
        length: steps of an episode and of a demonstration. shortcut: of the chain, see `ProgressChain`.
        steps, batch: iterations, and episodes in each.
        learning_rate: of the policy; value_rate: of the baseline's table.
        alpha, threshold, start, delta: of the scheduler, see `AutomaticDiscountScheduler`.
        every, probe: iterations from one look of the scheduler to the next, and episodes that it looks at.
        evaluation_episodes: of the policy, outside of training.
        task: of Meta-World. demonstrations: how many the expert gives.
        draws, minibatch, capacity, hidden, ahead: of SAC: gradient steps in an iteration, transitions in each, those
            that are kept, widths of the networks, and rewards in a target.
        device: where the cast is trained.
    """

    world: World = "chain"
    length: int = 20
    shortcut: float = 0.7
    steps: int = 1200
    batch: int = 16
    learning_rate: float = 6.0
    value_rate: float = 0.2
    alpha: float = 0.2
    threshold: float = 1.0
    start: float = 0.2
    delta: int = 1
    every: int = 20
    probe: int = 5
    evaluation_episodes: int = 200
    task: str = "basketball-v3"
    demonstrations: int = 10
    draws: int = 800
    minibatch: int = 256
    capacity: int = 150_000
    hidden: int = 256
    ahead: int = 3
    device: str = "cpu"


# What is imitated, and by whom


@dataclass(frozen=True)
class Ground:
    """A task, the same one for probes and for evaluations, and what a frame is compared with."""

    task: EnvTask
    probe: EnvTask
    evaluated: EnvTask
    costs: FrameCosts


@dataclass(frozen=True)
class Learner:
    """The cast, and what a stage trains it with; it reads the knob `discount` whenever it learns."""

    cast: Cast
    stage: dict[str, Any]


def whole_episodes(name: str, make: Any, copies: int, s: Settings) -> EnvTask:
    """Episodes of equal length, which record no discount: it is multiplied by whoever learns."""
    sizes: dict[str, Any] = {"copies": copies, "steps": s.length, "evaluation_steps": s.length}
    return EnvTask(name, make, episodes=True, discount=None, evaluation_episodes=s.evaluation_episodes, **sizes)


def led_to(rollout: Rollout) -> torch.Tensor:
    """The frame that each step of the chain led to: the last action would go unpaid if frames were those before."""
    frames: torch.Tensor = rollout["next_observations"]["frame"]
    return frames


def chain(seed: int, s: Settings) -> Ground:
    """The generated track and its one demonstration."""
    make = partial(ProgressChain, length=s.length, shortcut=s.shortcut, seed=seed)
    costs = FrameCosts([make(1).expert_frames], "euclidean", led_to)
    task, probe = whole_episodes("imitation", make, s.batch, s), whole_episodes("probe", make, s.probe, s)
    return Ground(task, probe, task, costs)


def tabular(ground: Ground, s: Settings) -> Learner:
    """A softmax over a table, by REINFORCE with a table of mean returns as its baseline.

    The gradient is multiplied by `1 - discount`, so that returns under different discounts are alike in size.
    """
    torso: Any = torso_for(ground.task.spaces[0], reads=("place",))
    head, critic = CategoricalHead(torso.width, int(ground.task.spaces[1].n), gain=0.0), ValueHead(torso.width)
    for layer in (head.logits, critic.layer):
        layer.bias.requires_grad_(False)  # All steps would share it.
    policy = ActionPolicy(torso, head)
    # What is probed and evaluated is the policy as it trains, its sampling included.
    policy.knobs = (Knob("temperature", 1.0, 0.0, evaluation=1.0),)
    discount = Knob("discount", 0.99, 0.0, 1.0)
    plain: dict[str, Any] = {"optimizer": torch.optim.SGD, "max_grad_norm": None}
    gradient = (1 - discount) * ReinforceObjective("constant", 1)
    values = 0.5 * ValueObjective(reads="policy", aggregate="constant", horizon=1)
    stage = {
        "credit": GAE(lam=1.0, normalize=None, reads="policy", discount=discount),
        "updates": [
            Update(gradient, learning_rate=s.learning_rate, **plain),
            Update(values, ["critic"], learning_rate=s.value_rate, **plain),
        ],
    }
    return Learner(Cast(policy=policy, critic=critic), stage)


def hand_and_object(rollout: Rollout) -> torch.Tensor:
    """Of Meta-World's state the hand, how far it is open, and where the object is and how it is turned."""
    state: torch.Tensor = rollout.observations
    return state[..., :11]


def metaworld(seed: int, s: Settings) -> Ground:
    """A task of Meta-World with its goals, seen as its state, and demonstrations by the script that comes with it."""
    make = partial(MetaWorld, s.task, seed=seed, horizon=s.length)
    shown = whole_episodes("demonstrations", make(), s.demonstrations, s).collect(
        {"policy": ScriptedExpert([s.task])}, {}, torch.Generator().manual_seed(seed), s.demonstrations
    )
    costs = FrameCosts(hand_and_object(shown), "euclidean", hand_and_object)
    task, probe = whole_episodes("imitation", make(), s.batch, s), whole_episodes("probe", make(), s.probe, s)
    return Ground(task, probe, whole_episodes("imitation", make(stops=True), 1, s), costs)


def soft(ground: Ground, s: Settings) -> Learner:
    """SAC on replayed transitions, whose sums are formed under the discount in force when they are drawn."""
    widths = (s.hidden, s.hidden)
    policy = ActionPolicy.for_spaces(*ground.task.spaces, widths=widths, squash=True, learned_std=True)
    critic = QNetwork.for_spaces(*ground.task.spaces, widths=widths)
    members: dict[str, nn.Module] = {"policy": policy, "critic": critic, "temperature": Temperature()}
    update = Update(
        sac(discount=0.99, n=s.ahead), list(members), learning_rate=s.learning_rate, optimizer=torch.optim.Adam,
        batches=Draws(s.draws, s.minibatch), max_grad_norm=None,
    )  # fmt: skip
    stage = {
        "memory": partial(ReplayMemory, s.capacity, "transition", ahead=s.ahead - 1),
        "rules": [ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.995)],
        "updates": [update],
    }
    return Learner(Cast(**{name: member.to(s.device) for name, member in members.items()}), stage)


WORLDS: dict[World, tuple[Callable[[int, Settings], Ground], Callable[[Ground, Settings], Learner]]] = {
    "chain": (chain, tabular),
    "metaworld": (metaworld, soft),
}


# The arms

FIXED = {"fixed_99": 0.99, "fixed_90": 0.9, "fixed_50": 0.5}


def scheduler(ground: Ground, s: Settings, threshold: float) -> AutomaticDiscountScheduler:
    """The discount grows with what is recognised in episodes of the policy as it is evaluated."""
    return AutomaticDiscountScheduler(
        ground.costs,
        Probe(ground.probe, s.probe, evaluating=True),
        every=s.every,
        alpha=s.alpha,
        threshold=threshold,
        progress_start=s.start,
        max_progress_delta=s.delta,
    )


def imitated(discount: float | None, threshold: float | None, seed: int, s: Settings) -> Regimen:
    """An arm: one discount for all of training, or a scheduler's with this threshold; they differ in nothing else.

    The episodes that a scheduler looks at are counted. An arm without one has as many more to learn from.
    """
    make_ground, make_learner = WORLDS[s.world]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ground = make_ground(seed, s)
        learner = make_learner(ground, s)
    controllers: list[Controller] = []
    steps = s.steps
    if discount is None:
        moving = scheduler(ground, s, s.threshold if threshold is None else threshold)
        controllers, discount = [moving], moving.discount
    else:
        steps += math.ceil((s.steps - 1) // s.every * s.probe / s.batch)
    stage = Stage(
        "imitate",
        [ground.task],
        steps,
        s.batch,
        reward=OptimalTransportReward(ground.costs),
        controllers=controllers,
        knobs={"discount": discount},
        evaluate_every=max(s.steps // 10, 1),
        **learner.stage,
    )
    return Regimen(learner.cast, [stage], [ground.evaluated])


# What is claimed


def success(seed: SeedResults, arm: str) -> float:
    """The share of episodes that succeed, at the end."""
    return seed[arm].final["imitation/success"]


def lead(arms: Sequence[str], seed: SeedResults) -> float:
    """The first arm minus the best of the others with this seed."""
    return success(seed, arms[0]) - max(success(seed, arm) for arm in arms[1:])


def ahead(name: str, text: str, *others: str, above: float = 0.0, judged: bool = True) -> Claim:
    """Scheduling is ahead of the best of some other arms, by more than a number."""
    arms = ["ads", *others]
    return Claim(name, text, partial(lead, arms), arms, above=above, judged=judged)


PAPER = Paper(
    slug="ads",
    title="Imitation Learning from Observation with Automatic Discount Scheduling",
    arxiv="2310.07433",
    verb="adapt",
    policy="action",
    claim="Where later behaviour depends on earlier behaviour, an imitator that is paid by optimal transport fails "
    "under the usual discount of 0.99, and succeeds under one that grows with what is recognised of the "
    "demonstrations, which is no worse than the best fixed discount in hindsight.",
    arms=[
        Arm("ads", "automatic discount scheduling", partial(imitated, None, None)),
        *(Arm(name, f"discount {value:g}", partial(imitated, value, None)) for name, value in FIXED.items()),
        Arm("time", "discount grows with time alone", partial(imitated, None, 0.0)),
    ],
    claims=[
        ahead("beats_099", "Success: scheduled minus a discount of 0.99", "fixed_99"),
        ahead("keeps_up", "Success: scheduled minus the seed's best fixed discount, within 0.05", *FIXED, above=-0.05),
        ahead("beats_time", "Success: scheduled minus growing with time alone", "time", judged=False),
    ],
    metrics={
        "imitation/success": "success",
        "imitation/correct": "right steps",
        "imitation/on_shortcut": "share on the shortcut",
    },
    scales={
        "quick": Settings(length=8, shortcut=0.85, steps=60, every=5, evaluation_episodes=50),
        "default": Settings(),
        "full": Settings(
            world="metaworld", length=200, steps=600, batch=8, learning_rate=3e-4, threshold=0.9, delta=5, every=6,
            probe=10, evaluation_episodes=20, device="cuda",
        ),
    },
    requires={"full": "metaworld"},
)  # fmt: skip
