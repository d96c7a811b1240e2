"""Dual RL: unification and new methods for reinforcement and imitation learning (arXiv 2302.08560).

Claim: offline methods that look unlike are cases of one dual, and the dual gives two better ones. ReCOIL imitates
from a few demonstrations beside arbitrary data, without rewards, and beats cloning either. f-DVL draws a value to the
best of the data by a loss that stays tame where XQL's exponential does not, and is as good where that is well set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models import DiscreteCritics, MLPTorso, OneHotTorso, QNetwork, ValueNetwork
from regimen.objectives import (
    AdvantageWeightedObjective,
    ChiSquare,
    Expectile,
    Gumbel,
    ImplicitValueObjective,
    Maximiser,
    Objective,
    ReCOILCriticObjective,
    SFTObjective,
    TDObjective,
    TotalVariation,
)
from regimen.policies.action import ActionPolicy
from regimen.policies.bounded import BoundedMeanHead
from regimen.policies.heads import CategoricalHead
from regimen.policies.uniform import UniformPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward
from regimen.tasks import DatasetTask, EnvTask, minari_environment, minari_transitions, transitions
from regimen.tasks.environments.tensor import Pendulum, SwingUp
from regimen.tasks.worlds.corner_grid import CornerGrid
from regimen.update import Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm.

    Attributes:
        data: `"pendulum"`, whose data are made, or the name of a Minari data set with actions that are numbers.
        episodes: of the pendulum, half of them random and half scripted.
        steps, batch, width, rate, policy_rate: offline control: updates of each member, transitions in each, units of a
            layer, learning rates.
        discount, decay: of the critic, and of its target.
        level_tv, level_chi2, level_expectile: of the maximisers.
        scales: XQL's, one for each of its arms.
        inverse_temperature: of the policy's weights, for rewards of the normal scale.
        reward_scale, stress: what rewards are multiplied by, and under stress.
        huber: the critic's error counts linearly beyond it.
        trials: episodes of an evaluation.
        demonstrations, walks, walk_steps: imitation: the expert's trajectories, random ones, and the length of both.
        imitation_steps, imitation_rate, imitation_decay: updates of each table, learning rate, the target's average.
        imitation_level: of the maximiser; beta: the expert's share of a batch.
        device: where networks of offline control are.
    """

    data: str = "pendulum"
    episodes: int = 250
    steps: int = 1500
    batch: int = 256
    width: int = 64
    rate: float = 1e-3
    policy_rate: float = 1e-3
    discount: float = 0.99
    decay: float = 0.98
    level_tv: float = 0.8
    level_chi2: float = 0.7
    level_expectile: float = 0.8
    scales: tuple[float, float] = (0.5, 2.0)
    inverse_temperature: float = 3.0
    reward_scale: float = 0.1
    stress: float = 10.0
    huber: float = 20.0
    trials: int = 50
    demonstrations: int = 2
    walks: int = 150
    walk_steps: int = 40
    imitation_steps: int = 800
    imitation_rate: float = 0.1
    imitation_decay: float = 0.95
    imitation_level: float = 0.9
    beta: float = 0.5
    device: str = "cpu"


Make = Callable[[Settings], Maximiser | None]
"""The settings to a maximiser; to none, which is cloning."""


# Three members, each with an update of its own, in this order


def updates(value: Objective, policy: Objective, critic: Objective, rate: float, policy_rate: float) -> list[Update]:
    """The value looks at the critic of before, the policy at the value of now."""
    parts = [("value", value, rate), ("policy", policy, policy_rate), ("critic", critic, rate)]
    return [update(objective, member, speed) for member, objective, speed in parts]


def update(objective: Objective, member: str, rate: float) -> Update:
    """Adam, gradients as they are."""
    return Update(objective, [member], rate, torch.optim.Adam, max_grad_norm=None)


def target(decay: float) -> ReferenceRefresh:
    """The critics' average."""
    return ReferenceRefresh("critic_target", of="critic", mode="ema", decay=decay)


# Imitation: a grid whose corner pays, which nobody is told


def demonstrated(world: CornerGrid, seed: int, s: Settings) -> tuple[TensorDict, TensorDict]:
    """The expert's steps from the corner opposite, and random ones from anywhere; no rewards."""
    rng = torch.Generator().manual_seed(seed)
    first = torch.zeros(s.demonstrations, dtype=torch.int64)
    anywhere = torch.randint(world.states, (s.walks,), generator=rng)
    uniform = torch.full_like(world.expert, 1 / world.actions)
    return world.walks(world.expert, first, s.walk_steps, rng), world.walks(uniform, anywhere, s.walk_steps, rng)


def tables(world: CornerGrid, shared: bool) -> Cast:
    """A number for every cell, and for every action in it; and, if wanted, one per action that all cells share."""
    sight = OneHotTorso(world.states)
    policy = ActionPolicy(sight, CategoricalHead(world.states, world.actions))
    critic, value = DiscreteCritics(sight, world.actions, critics=1), ValueNetwork(sight)
    for network in [critic, value] if shared else [policy, critic, value]:
        for name, weight in network.named_parameters():
            weight.requires_grad_(not name.endswith("bias"))
    return Cast(policy=policy, critic=critic, value=value)


def imitation(kind: str, shared: bool, seed: int, s: Settings) -> Regimen:
    """ReCOIL; the same maximiser and policy on rewards that are log-ratios of counts; or cloning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        world = CornerGrid(discount=0.95)
        cast = tables(world, shared)
    expert, other = demonstrated(world, seed, s)
    if kind == "ratio":
        for rows in (expert, other):
            rows["step_columns", "env_reward"] = log_ratio(world, expert, other, rows, s.beta)
    tasks = [
        DatasetTask("expert", expert, order="random", evaluate=world.measure),
        DatasetTask("other", other, order="random"),
    ]
    policy: Objective = AdvantageWeightedObjective(s.inverse_temperature)
    value = ImplicitValueObjective(TotalVariation(s.imitation_level))
    critics: dict[str, Objective] = {
        "recoil": ReCOILCriticObjective(discount=world.discount),
        "ratio": TDObjective(target="value", policy=None, discount=world.discount),
    }
    learned = kind in critics
    if learned:
        taken = updates(value, policy, critics[kind], s.imitation_rate, s.imitation_rate)
    else:
        taken = [update(SFTObjective(), "policy", s.imitation_rate)]
    share = {"bc_expert": 1.0, "bc_all": len(expert) / (len(expert) + len(other))}.get(kind, s.beta)
    stage = Stage(
        kind,
        tasks,
        s.imitation_steps,
        s.batch,
        reward=EnvironmentReward() if kind == "ratio" else None,
        updates=taken,
        rules=[target(s.imitation_decay)] if learned else [],
        knobs={"mixture/expert": share, "mixture/other": 1 - share},
    )
    return Regimen(cast, [stage], evaluations=tasks[:1])


def log_ratio(world: CornerGrid, expert: TensorDict, other: TensorDict, rows: TensorDict, beta: float) -> Any:
    """`[N, 1]`, the logarithm of how much likelier the expert takes a row's step than the mixture, at least -5."""
    mine, others = world.visits(expert), world.visits(other)
    ratio = (mine / (beta * mine + (1 - beta) * others)).log().clamp(min=-5).float()
    return ratio[rows["observations"], rows["actions"]]


# Offline control: a pendulum, or a recorded data set


def recorded(seed: int, s: Settings) -> tuple[TensorDict, EnvTask]:
    """Transitions, and where policies are tried."""
    if s.data != "pendulum":
        return minari_transitions(s.data), EnvTask("control", minari_environment(s.data), evaluation_episodes=s.trials)
    rng, parts = torch.Generator().manual_seed(seed), []
    cast = {"random": UniformPolicy(Pendulum(1).action_space), "script": SwingUp()}
    for member in cast:
        copies = s.episodes // 2
        task = EnvTask(member, Pendulum, copies=copies, steps=200, episodes=True, discount=None, member=member)
        parts.append(transitions(task.collect(cast, {}, rng, copies)))
    return torch.cat(parts), EnvTask("control", Pendulum, evaluation_episodes=s.trials)


def networks(task: EnvTask, s: Settings) -> Cast:
    """A policy, twin critics, a value."""
    seen, actions = task.spaces
    inputs, size, box = seen.shape[0], actions.shape[0], (actions.low, actions.high)
    widths = (s.width, s.width)
    cast = Cast(
        policy=ActionPolicy(MLPTorso(inputs, widths, nn.ReLU), BoundedMeanHead(s.width, size, box=box)),
        critic=QNetwork(MLPTorso(inputs, ()), size, widths=widths, box=box),
        value=ValueNetwork(MLPTorso(inputs, widths, nn.ReLU)),
    )
    for member in cast.values():
        member.to(s.device)
    return cast


def control(make: Make, stressed: bool, seed: int, s: Settings) -> Regimen:
    """A value by some maximiser, a policy by advantages, critics by that value; without a maximiser, cloning."""
    rows, task = recorded(seed, s)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast = networks(task, s)
    scale = s.stress if stressed else s.reward_scale
    f = make(s)
    if f is None:
        taken = [update(SFTObjective(), "policy", s.policy_rate)]
    else:
        # The same weights for the same returns, whatever rewards are multiplied by.
        policy = AdvantageWeightedObjective(s.inverse_temperature * s.reward_scale / scale)
        critic = TDObjective(target="value", policy=None, discount=s.discount, distance="huber", delta=s.huber)
        taken = updates(ImplicitValueObjective(f), policy, critic, s.rate, s.policy_rate)
    stage = Stage(
        "offline",
        [DatasetTask("data", rows, order="random")],
        s.steps,
        s.batch,
        reward=None if f is None else scale * EnvironmentReward(),
        updates=taken,
        rules=[] if f is None else [target(s.decay)],
    )
    return Regimen(cast, [stage], evaluations=[task])


def xql(arm: int, s: Settings) -> Maximiser:
    """With the clip and the rescaling of the released code."""
    return Gumbel(s.scales[arm])


def scaled_xql(s: Settings) -> Maximiser:
    """With a scale that grows as rewards do under stress."""
    return Gumbel(s.scales[0] * s.stress / s.reward_scale)


def plain_xql(s: Settings) -> Maximiser:
    """Without them."""
    return Gumbel(s.scales[0], clip=None, rescale=False)


IMITATION: dict[str, tuple[str, str, bool]] = {
    "bc_expert": ("cloning the demonstrations", "bc_expert", False),
    "bc_all": ("cloning all data", "bc_all", False),
    "recoil": ("ReCOIL", "recoil", False),
    "ratio": ("log-ratios of counts as rewards", "ratio", False),
    "bc_shared": ("cloning the demonstrations, cells share a bias", "bc_expert", True),
    "recoil_shared": ("ReCOIL, cells share a bias", "recoil", True),
}
CONTROL: dict[str, tuple[str, Make, bool]] = {
    "bc": ("cloning", lambda s: None, False),
    "iql": ("IQL", lambda s: Expectile(s.level_expectile), False),
    "xql": ("XQL, scale 0.5", partial(xql, 0), False),
    "xql_wide": ("XQL, scale 2", partial(xql, 1), False),
    "tv": ("f-DVL, total variation", lambda s: TotalVariation(s.level_tv), False),
    "chi2": ("f-DVL, chi-square", lambda s: ChiSquare(s.level_chi2), False),
    "xql_stress": ("XQL, scale 0.5, large rewards", partial(xql, 0), True),
    "xql_plain_stress": ("XQL without clip and rescaling, large rewards", plain_xql, True),
    "xql_scaled_stress": ("XQL, scale 50, large rewards", scaled_xql, True),
    "tv_stress": ("f-DVL, total variation, large rewards", lambda s: TotalVariation(s.level_tv), True),
    "chi2_stress": ("f-DVL, chi-square, large rewards", lambda s: ChiSquare(s.level_chi2), True),
}


# What is claimed


def gain(metric: str, arm: str, other: str, seed: SeedResults) -> float:
    """One arm minus another, at the end."""
    return seed[arm].final[metric] - seed[other].final[metric]


def better(text: str, metric: str, arm: str, other: str, judged: bool = False) -> Claim:
    """One arm is better than another."""
    return Claim(f"{arm}-{other}", text, partial(gain, metric, arm, other), [arm, other], judged=judged)


def share(seed: SeedResults) -> float:
    """What ReCOIL is worth, relative to the expert."""
    return seed["recoil"].final["expert/expert_share"]


def tamer(arm: str, other: str, seed: SeedResults) -> float:
    """How many powers of ten smaller the largest gradient of the value is than another arm's."""
    return math.log10(seed[other].gradients["value"] / seed[arm].gradients["value"])


WORTH, RETURN = "expert/worth", "control/return"
PAPER = Paper(
    slug="dual-rl",
    title="Dual RL: Unification and New Methods for Reinforcement and Imitation Learning",
    arxiv="2302.08560",
    verb="learn",
    policy="action",
    claim="With two demonstrations beside random data, and no rewards, ReCOIL comes close to the expert and beats "
    "cloning either. Where rewards are large, f-DVL keeps the value's gradients small and does better than XQL, and "
    "where XQL is well set, it is as good.",
    arms=[
        *(Arm(name, title, partial(imitation, kind, shared)) for name, (title, kind, shared) in IMITATION.items()),
        *(Arm(name, title, partial(control, make, stressed)) for name, (title, make, stressed) in CONTROL.items()),
    ],
    claims=[
        better("Worth: ReCOIL minus cloning the demonstrations", WORTH, "recoil", "bc_expert", True),
        better("Worth: ReCOIL minus cloning all data", WORTH, "recoil", "bc_all", True),
        Claim("share", "ReCOIL's share of the expert's worth", share, ["recoil"], above=0.8),
        better("Large rewards, return: f-DVL (chi-square) minus XQL", RETURN, "chi2_stress", "xql_stress", True),
        Claim(
            "gradients",
            "Large rewards, powers of ten by which f-DVL's (chi-square) largest gradient is below plain XQL's",
            partial(tamer, "chi2_stress", "xql_plain_stress"),
            ["chi2_stress", "xql_plain_stress"],
            above=1.0,
        ),
        Claim(
            "gradients_rescaled",
            "The same, below XQL's with clip and rescaling",
            partial(tamer, "chi2_stress", "xql_stress"),
            ["chi2_stress", "xql_stress"],
            judged=False,
        ),
        better("Large rewards, return: f-DVL (total variation) minus XQL", RETURN, "tv_stress", "xql_stress"),
        better("Large rewards, return: f-DVL (chi-square) minus plain XQL", RETURN, "chi2_stress", "xql_plain_stress"),
        better(
            "Large rewards, return: f-DVL (chi-square) minus XQL, scale 50", RETURN, "chi2_stress", "xql_scaled_stress"
        ),
        Claim(
            "parity",
            "Return: f-DVL (chi-square) minus XQL, scale 0.5",
            partial(gain, RETURN, "chi2", "xql"),
            ["chi2", "xql"],
            above=-50.0,
        ),
        better("Return: f-DVL (chi-square) minus XQL, scale 2", RETURN, "chi2", "xql_wide"),
        better("Return: f-DVL (total variation) minus XQL, scale 0.5", RETURN, "tv", "xql"),
        better("Return: f-DVL (chi-square) minus IQL", RETURN, "chi2", "iql"),
        better("Return: f-DVL (chi-square) minus cloning", RETURN, "chi2", "bc"),
        better("Worth: ReCOIL minus log-ratios of counts", WORTH, "recoil", "ratio"),
        better("Cells share a bias, worth: ReCOIL minus cloning", WORTH, "recoil_shared", "bc_shared"),
    ],
    metrics={
        WORTH: "share of time in the corner",
        RETURN: "return",
        "expert/expert_share": "relative to the expert",
    },
    scales={
        "quick": Settings(episodes=20, steps=30, trials=4, imitation_steps=60),
        "default": Settings(),
        "full": Settings(
            data="mujoco/hopper/medium-v0",
            steps=200_000,
            width=256,
            rate=3e-4,
            decay=0.995,
            reward_scale=0.3,
            trials=10,
            device="cuda",
        ),
    },
    requires={"full": "minari"},
)
