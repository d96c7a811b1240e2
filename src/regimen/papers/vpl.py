"""Personalizing RLHF with Variational Preference Learning, VPL (arXiv 2408.10075).

Claim: where users of different kinds want different things and nobody says who is of which kind, a reward that infers
the user's latent from a few labelled pairs ranks what new users prefer, and leads policies to where they want to be;
one reward for all averages over the kinds and does neither. A reward model is the trainee, and afterwards the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.controllers import Linear, Schedule
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models.latent_reward import ConcatenatingEncoder, LatentReward, PairEncoder
from regimen.models.q_network import QNetwork
from regimen.models.torsos import DictTorso, MLPTorso
from regimen.models.value_network import ValueNetwork
from regimen.objectives import Expectile, VariationalPreferenceObjective, iql
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import GaussianHead
from regimen.policies.personal import PersonalPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import NormalizedReward, Reward, VariationalReward, WinProbabilityReward
from regimen.tasks import Conditioned, DatasetTask, EnvTask, QueryTask, StoredUsers
from regimen.tasks.environments.tensor import UserSquare
from regimen.tasks.preferences import personal_accuracy, random_context
from regimen.tasks.worlds.readers import Readers, rated_answers
from regimen.tasks.worlds.user_goals import REACH, UserGoals, uniform
from regimen.update import Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm.

    Attributes:
        world: `"square"`, of users who want to be near one of three goals; or `"texts"`, of readers who judge answers
            by one of four aspects, which has no policy (`control_steps=0`).
        data, records, model: of texts: rated answers (UltraFeedback's name, or a file of JSON lines in its form), how
            many prompts of them, and the frozen language model whose features are a text's state.
        users, pairs: users who are learned from, and labelled pairs of each.
        held_out, targets: new users, and pairs of each to be predicted, beside `pairs` that are shown.
        latent, widths: numbers of the latent; layers of every network.
        attention: whether a user's pairs look at each other before they are averaged.
        reward_steps, reward_batch, reward_rate: updates of the reward, users in each, and learning rate.
        warm_up: the share of them in which the weight of the divergence rises from 0 to 1.
        walks, walk_steps: offline data of the policy.
        control_steps, control_batch, control_rate: updates of the policy, transitions in each, and learning rate; no
            policy is trained in 0 steps.
        discount, expectile, inverse_temperature, decay: of IQL.
        episodes: users that the policy is tried with.
        comparison: states that a state is compared with where rewards are probabilities to win.
        candidates: sets of questions among which active queries choose; questions: how many are asked.
        device: where the networks are trained.
    """

    world: Literal["square", "texts"] = "square"
    data: str = "openbmb/UltraFeedback"
    records: int = 10_000
    model: str = "gpt2"
    users: int = 4000
    pairs: int = 8
    held_out: int = 500
    targets: int = 16
    latent: int = 4
    widths: tuple[int, ...] = (64, 64)
    attention: bool = False
    reward_steps: int = 1500
    reward_batch: int = 128
    reward_rate: float = 1e-3
    warm_up: float = 0.5
    walks: int = 2000
    walk_steps: int = 25
    control_steps: int = 3000
    control_batch: int = 256
    control_rate: float = 1e-3
    discount: float = 0.9
    expectile: float = 0.9
    inverse_temperature: float = 10.0
    decay: float = 0.99
    episodes: int = 300
    comparison: int = 100
    candidates: int = 200
    questions: tuple[int, ...] = (1, 2, 4)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.world == "texts" and self.control_steps:
            raise ValueError(
                f"control_steps is {self.control_steps} in the world of texts, which has no policy; set it to 0"
            )


@dataclass(frozen=True)
class Method:
    """What arms differ in.

    Attributes:
        encoder: what infers the user: nothing, the mean over pairs, or all pairs side by side.
        tells: whether every state tells the user's kind.
        scales: see `UserGoals`.
        wins: whether the policy is judged by the probability to win against other states, in place of the reward.
    """

    encoder: Literal["none", "pairs", "concatenating"] = "pairs"
    tells: bool = False
    scales: tuple[float, ...] = ()
    wins: bool = False


# Who is asked, and who learns


class Users:
    """Whom a reward is learned from, and whom it is tried on."""

    def __init__(self, method: Method, seed: int, settings: Settings) -> None:
        self.settings, s = settings, settings
        self.rng, self.goals = torch.Generator().manual_seed(seed), UserGoals(method.tells, method.scales)
        known: UserGoals | Readers = self.goals
        others: UserGoals | Readers = self.goals
        if s.world == "texts":
            known, others = Readers.split(rated_answers(s.data)[: s.records], s.model, method.tells, s.device)
        self.states = known.states
        self.asked = known.sets(s.users, s.pairs, self.rng)
        self.new = others.sets(s.held_out, s.pairs + s.targets, self.rng)

    def held_out(self) -> DatasetTask:
        """New users: pairs that a reward has seen, and pairs that it predicts."""
        return DatasetTask("users", self.new, evaluate=partial(personal_accuracy, context=self.settings.pairs))

    def queries(self) -> QueryTask:
        """The same users, asked a few questions."""
        sets = self.settings.candidates, max(self.settings.questions), 1
        candidates = uniform(sets, self.rng), uniform(sets, self.rng)
        return QueryTask("queries", self.new, self.goals.answers, candidates, asked=self.settings.questions)

    def square(self) -> EnvTask:
        """Where new users are to be brought to their goals."""
        s = self.settings
        make = partial(UserSquare, users=self.goals, pairs=s.pairs)
        return EnvTask("square", make, evaluation_episodes=s.episodes, evaluated="guide")

    def walks(self) -> Conditioned:
        """Offline data, each step told the latent of some user in store."""
        steps = self.goals.walks(self.settings.walks, self.settings.walk_steps, self.rng)
        return Conditioned(DatasetTask("walks", steps, order="random"), StoredUsers(self.asked))


def reward_model(method: Method, users: Users, s: Settings) -> LatentReward:
    """A reward, and what infers whose it is."""
    encoders: dict[str, Any] = {
        "none": lambda: None,
        "pairs": lambda: PairEncoder(users.states, s.latent, s.widths, attention=s.attention),
        "concatenating": lambda: ConcatenatingEncoder(users.states, s.latent, s.pairs, s.widths),
    }
    return LatentReward(users.states, encoders[method.encoder](), s.widths)


def sight(model: LatentReward, widths: tuple[int, ...] = ()) -> DictTorso:
    """A network of a state and a latent."""
    parts = {"state": MLPTorso(model.states, ()), "condition": MLPTorso(model.latent, ())}
    return DictTorso(parts, widths, nn.ReLU)


def members(model: LatentReward, s: Settings) -> Cast:
    """The reward, and what learns to act by it."""
    policy = ActionPolicy(sight(model, s.widths), GaussianHead(s.widths[-1], 2, log_std=-2.0))
    critic = QNetwork(sight(model), 2, widths=s.widths, box=(-REACH, REACH))
    value = ValueNetwork(sight(model, s.widths))
    networks = {"reward_model": model, "policy": policy, "critic": critic, "value": value}
    for network in networks.values():
        network.to(s.device)
    return Cast(**networks, guide=PersonalPolicy(policy, model))


# The stages


def reward_stage(users: Users, s: Settings, transform: Any = None) -> Stage:
    """The reward model learns from everyone's pairs."""
    task = DatasetTask("pairs", users.asked, transform=transform)
    update = Update(
        VariationalPreferenceObjective(),
        ["reward_model"],
        learning_rate=s.reward_rate,
        optimizer=torch.optim.Adam,
        max_grad_norm=None,
    )
    rise = Schedule("kl_weight", Linear(0.0, 1.0, max(int(s.warm_up * s.reward_steps), 1)))
    return Stage("reward", [task], s.reward_steps, s.reward_batch, updates=[update], controllers=[rise])


def policy_stage(method: Method, users: Users, s: Settings) -> Stage:
    """The policy learns offline, from what the reward model says of some user's steps."""
    walks, reward = users.walks(), VariationalReward()
    judged: Reward = reward
    if method.wins:
        judged = WinProbabilityReward(reward, uniform((s.comparison,), users.rng))
    objective = iql(f=Expectile(s.expectile), inverse_temperature=s.inverse_temperature, discount=s.discount)
    update = Update(
        objective,
        ["value", "policy", "critic"],
        learning_rate=s.control_rate,
        optimizer=torch.optim.Adam,
        max_grad_norm=None,
    )
    return Stage(
        "policy",
        [walks],
        s.control_steps,
        s.control_batch,
        reward=NormalizedReward(judged, center=True),
        updates=[update],
        rules=[ReferenceRefresh("critic_target", of="critic", mode="ema", decay=s.decay)],
    )


# The arms


def personal(method: Method, seed: int, s: Settings) -> Regimen:
    """A reward, and a policy that it judges."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        users = Users(method, seed, s)
        cast = members(reward_model(method, users, s), s)
    stages, evaluations = [reward_stage(users, s)], [users.held_out()]
    if not s.control_steps:
        return Regimen(cast, stages, evaluations=evaluations)
    return Regimen(cast, [*stages, policy_stage(method, users, s)], evaluations=[*evaluations, users.square()])


def inquiring(seed: int, s: Settings) -> Regimen:
    """A reward that has met users of whom little was known, and chooses what to ask."""
    if s.world == "texts":
        raise ValueError(
            "arm 'inquiring' asks about places in the square, and the world is that of texts; leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        users = Users(Method(), seed, s)
        model = reward_model(Method(), users, s).to(s.device)
    stage = reward_stage(users, s, random_context)
    return Regimen(Cast(reward_model=model), [stage], evaluations=[users.held_out(), users.queries()])


SCALES = (1.0, 10.0)
METHODS: dict[str, tuple[str, Method]] = {
    "btl": ("one reward for all (BTL)", Method("none")),
    "vpl": ("VPL", Method()),
    "oracle": ("one reward that is told the kind", Method("none", tells=True)),
    "concatenating": ("VPL, all pairs side by side", Method("concatenating")),
    "scaled": ("VPL, users unequally sure", Method(scales=SCALES)),
    "win_probability": ("VPL-SPO, users unequally sure", Method(scales=SCALES, wins=True)),
}
EXTENDED = ("concatenating", "scaled", "win_probability")


# What is claimed


def gain(metric: str, arm: str, other: str, seed: SeedResults) -> float:
    """One arm minus another, at the end."""
    return seed[arm].final[metric] - seed[other].final[metric]


def better(name: str, text: str, metric: str, arm: str, other: str, above: float = 0.0, judged: bool = False) -> Claim:
    """One arm is better than another."""
    return Claim(name, text, partial(gain, metric, arm, other), [arm, other], above=above, judged=judged)


def asked(count: int, form: str, seed: SeedResults) -> float:
    """How much more is known after chosen questions than after questions at random."""
    final = seed["inquiring"].final
    return final[f"queries/{form}_{count}"] - final[f"queries/random_{count}"]


def half(seed: SeedResults) -> float:
    """How much more is known after two chosen questions than after four at random."""
    final = seed["inquiring"].final
    return final["queries/mixture_2"] - final["queries/random_4"]


PAPER = Paper(
    slug="vpl",
    title="Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning",
    arxiv="2408.10075",
    verb="judge, learn",
    policy="action",
    claim="With hidden kinds of users who want different things, a reward with a latent that is inferred from a few "
    "labelled pairs predicts what new users prefer far better than one reward for all, and a policy that is told the "
    "latent brings them to their own goals.",
    arms=[
        *(
            Arm(name, title, partial(personal, method), extended=name in EXTENDED)
            for name, (title, method) in METHODS.items()
        ),
        Arm("inquiring", "VPL, any number of pairs, active queries", inquiring),
    ],
    claims=[
        better("accuracy", "Accuracy on new users' pairs: VPL minus BTL", "users/accuracy", "vpl", "btl", 0.1, True),
        better("success", "New users brought to their goal: VPL minus BTL", "square/success", "vpl", "btl", 0.1, True),
        better("accuracy_oracle", "Accuracy: VPL minus the oracle", "users/accuracy", "vpl", "oracle"),
        better("success_oracle", "Success: VPL minus the oracle", "square/success", "vpl", "oracle"),
        *(
            Claim(
                f"{form}_{count}",
                f"Accuracy after {count} chosen questions ({form}) minus after as many at random",
                partial(asked, count, form),
                ["inquiring"],
                judged=False,
            )
            for form in ("mixture", "released")
            for count in (1, 2, 4)
        ),
        Claim(
            "half",
            "Accuracy after 2 chosen questions (mixture) minus after 4 at random",
            half,
            ["inquiring"],
            judged=False,
        ),
        better("encoder", "Accuracy: mean over pairs minus side by side", "users/accuracy", "vpl", "concatenating"),
        better(
            "spo", "Users unequally sure, success: VPL-SPO minus VPL", "square/success", "win_probability", "scaled"
        ),
    ],
    metrics={
        "users/accuracy": "accuracy, new users' pairs",
        "users/context_accuracy": "accuracy, pairs shown",
        "users/kl": "KL (nats per user)",
        "users/probe": "kind told from the latent",
        "square/success": "success (within 0.5)",
        "square/near": "within 0.3",
        **{
            f"queries/{form}_{n}": f"{form}, {n} asked" for n in (1, 2, 4) for form in ("random", "mixture", "released")
        },
    },
    scales={
        "quick": Settings(
            users=500, held_out=100, reward_steps=150, walks=100, control_steps=30, episodes=30, candidates=20
        ),
        "default": Settings(),
        "full": Settings(
            world="texts",
            held_out=1000,
            latent=64,
            widths=(512, 512),
            attention=True,
            reward_steps=10_000,
            reward_rate=1e-4,
            control_steps=0,
            device="cuda",
        ),
    },
    requires={"full": "datasets"},
)
