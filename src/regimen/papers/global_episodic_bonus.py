"""A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236).

Claim: where every episode offers the same places in the same roles, a bonus for what is new in all of training explores
better than one for what is new in the episode; where every episode is another maze it is the other way round; and their
product is about as good as the better of the two in either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium
import torch
from torch import nn

from regimen.cast import Cast
from regimen.credit import GAE, Credit
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models.torsos import MLPTorso, torso_for
from regimen.models.value_head import ValueHead
from regimen.objectives import (
    EntropyBonus,
    FeatureDistillation,
    InverseDynamicsObjective,
    ReinforceObjective,
    ValueObjective,
    ppo,
)
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import (
    CountBonus,
    EllipticalBonus,
    EnvironmentReward,
    Expression,
    NormalizedReward,
    RandomDistillationBonus,
    row_key,
)
from regimen.tasks.env import EnvTask
from regimen.tasks.environments import Gymnasium
from regimen.tasks.environments.tensor import Corridors, Mazes
from regimen.update import Epochs, Update

Place = Literal["corridors", "mazes", "maze"]
Bonus = Literal["none", "episodic", "global", "product"]
World = Literal["tables", "minigrid"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same for every bonus.

    Attributes:
        world: what is explored and by whom, see `WORLDS`.
        bonuses: `"counts"` of visits; or `"learned"`, elliptical in the episode and random distillation over training.
        beta: weight of the bonus, which is divided by its running deviation.
        learning_rate: of the policy. value_rate: of the baseline's table, which moves towards a state's mean return by
            this times the state's share of all steps.
        corridor_steps, corridor_batch, corridor_entropy: iterations, episodes in each, and weight of the entropy.
        maze_steps, maze_batch, maze_entropy: the same in mazes.
        contexts: how many mazes there are where there are many.
        features, feature_rate: of the learned bonuses, their width and learning rate.
        rooms_steps, copies, segment, hidden, entropy: of PPO in MiniGrid: iterations, samples and their steps in each,
            width of the recurrent core, and weight of the entropy.
        few_rooms, many_rooms: the environments of MiniGrid.
        device: where the cast is trained.
    """

    world: World = "tables"
    bonuses: Literal["counts", "learned"] = "counts"
    beta: float = 0.1
    discount: float = 0.99
    learning_rate: float = 2.0
    value_rate: float = 1.0
    corridor_steps: int = 250
    corridor_batch: int = 16
    corridor_entropy: float = 0.01
    maze_steps: int = 150
    maze_batch: int = 32
    maze_entropy: float = 0.002
    contexts: int = 400
    features: int = 64
    feature_rate: float = 1e-3
    rooms_steps: int = 400
    copies: int = 64
    segment: int = 128
    hidden: int = 256
    entropy: float = 0.005
    few_rooms: str = "MiniGrid-MultiRoom-N4-S5-v1"
    many_rooms: str = "MiniGrid-MultiRoom-N6-v0"
    device: str = "cpu"


# Where it is explored


@dataclass(frozen=True)
class Ground:
    """A task, and for how long it is explored.

    Attributes:
        sees: the entry of the observations that the policy sees, all by default.
        novel: the entry of which bonuses ask whether it is new, all by default. It never tells the contexts apart.
    """

    task: EnvTask
    steps: int
    batch: int
    entropy: float
    sees: str | None = None
    novel: str | None = None

    def torso(self, entry: str | None) -> Any:
        """A network of one entry of the observations, or of all."""
        return torso_for(self.task.spaces[0], reads=None if entry is None else (entry,))

    def key(self, observations: Any) -> torch.Tensor:
        """Equal where counts take a state for the same."""
        return row_key(observations if self.novel is None else observations[self.novel])


def whole_episodes(name: Place, make: Any, limit: int, batch: int, s: Settings) -> EnvTask:
    """Batches of episodes; evaluated on as many as twenty iterations have."""
    return EnvTask(
        name,
        make,
        copies=batch,
        steps=limit,
        episodes=True,
        discount=s.discount,
        evaluation_episodes=20 * batch,
        evaluation_steps=limit,
    )


def tables(place: Place, seed: int, s: Settings) -> Ground:
    """Five corridors of which one has a goal, for the whole of training; or mazes, many or one."""
    if place == "corridors":
        task = whole_episodes(place, partial(Corridors, seed=seed), 10, s.corridor_batch, s)
        return Ground(task, s.corridor_steps, s.corridor_batch, s.corridor_entropy)
    pool = s.contexts if place == "mazes" else 1
    task = whole_episodes(place, partial(Mazes, pool=pool, seed=seed, shows_cell=True), 60, s.maze_batch, s)
    return Ground(task, s.maze_steps, s.maze_batch, s.maze_entropy, sees="sight", novel="cell")


class Level(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Always the same level, if one is given; and a step tells `success`."""

    def __init__(self, env: gymnasium.Env[Any, Any], level: int | None) -> None:
        super().__init__(env)
        self.level = level

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start the level."""
        return self.env.reset(seed=seed if self.level is None else self.level, options=options)

    def step(self, action: Any) -> Any:
        """A step, a success if it is paid."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        return seen, reward, terminated, truncated, {**info, "success": float(reward) > 0}


def minigrid(place: Place, seed: int, s: Settings) -> Ground:
    """MiniGrid's rooms in a row, seen as an image: few of them, one level; many, a new level each time or one."""
    from minigrid.wrappers import ImgObsWrapper

    level = partial(Level, level=None if place == "mazes" else seed)
    name = s.few_rooms if place == "corridors" else s.many_rooms
    make = Gymnasium(name, wrappers=(ImgObsWrapper, level), tells=("success",))
    some: dict[str, Any] = {"copies": s.copies, "evaluation_episodes": s.copies}
    task = EnvTask(place, make, steps=s.segment, discount=s.discount, **some)
    return Ground(task, s.rooms_steps, s.copies, s.entropy)


# What is new


@dataclass(frozen=True)
class Novelty:
    """A bonus, the members of the cast that it asks, and the updates that train them."""

    reward: Expression
    members: Mapping[str, nn.Module] = field(default_factory=dict)
    updates: Sequence[Update] = ()

    def __mul__(self, other: Novelty) -> Novelty:
        members = {**self.members, **other.members}
        return Novelty(self.reward * other.reward, members, [*self.updates, *other.updates])


def episodic(ground: Ground, s: Settings) -> Novelty:
    """New in the episode: a first visit, or far from what was seen in it (E3B)."""
    if s.bonuses == "counts":
        return Novelty(CountBonus("episodic", ground.key, form="first"))
    actions = int(ground.task.spaces[1].n)
    members = {"bonus_encoder": encoder(ground, s), "inverse_dynamics": CategoricalHead(2 * s.features, actions)}
    update = Update(InverseDynamicsObjective(), list(members), learning_rate=s.feature_rate)
    return Novelty(EllipticalBonus(), members, [update])


def over_training(ground: Ground, s: Settings) -> Novelty:
    """New in all of training: few visits, or features that are predicted badly (RND)."""
    if s.bonuses == "counts":
        return Novelty(CountBonus("global", ground.key))
    members = {"bonus_target": encoder(ground, s).requires_grad_(False), "bonus_predictor": encoder(ground, s)}
    update = Update(FeatureDistillation(distance="norm"), ["bonus_predictor"], learning_rate=s.feature_rate)
    return Novelty(RandomDistillationBonus(), members, [update])


def encoder(ground: Ground, s: Settings) -> nn.Module:
    """What may be new, to features."""
    torso = ground.torso(ground.novel)
    return nn.Sequential(torso, MLPTorso(torso.width, (s.features,)))


NOVELTIES: dict[Bonus, Callable[[Ground, Settings], Novelty]] = {
    "episodic": episodic,
    "global": over_training,
    "product": lambda ground, s: episodic(ground, s) * over_training(ground, s),
}


# Who explores


@dataclass(frozen=True)
class Learner:
    """A policy, its critic (a head on its features), and how they are trained."""

    policy: ActionPolicy
    critic: ValueHead
    credit: Credit
    updates: Sequence[Update]


def tabular(ground: Ground, s: Settings) -> Learner:
    """A softmax over a table, by REINFORCE with a table of mean returns as its baseline."""
    torso, actions = ground.torso(ground.sees), int(ground.task.spaces[1].n)
    head, critic = CategoricalHead(torso.width, actions, gain=0.0), ValueHead(torso.width)
    for layer in (head.logits, critic.layer):
        layer.bias.requires_grad_(False)  # All states would share it.
    gradient = ReinforceObjective("constant", 1) - ground.entropy * EntropyBonus(aggregate="constant", horizon=1)
    plain: dict[str, Any] = {"optimizer": torch.optim.SGD, "max_grad_norm": None}
    return Learner(
        ActionPolicy(torso, head),
        critic,
        GAE(lam=1.0, normalize=None, reads="policy"),
        [
            Update(gradient, learning_rate=s.learning_rate, **plain),
            Update(0.5 * ValueObjective(reads="policy"), ["critic"], learning_rate=s.value_rate, **plain),
        ],
    )


def recurrent(ground: Ground, s: Settings) -> Learner:
    """A convolutional policy with memory, by PPO."""
    objective = ppo(entropy_weight=ground.entropy, reads="policy")
    update = Update(
        objective, ["policy", "critic"], learning_rate=s.learning_rate, batches=Epochs(4, 4), max_grad_norm=0.5
    )
    policy = ActionPolicy.for_spaces(*ground.task.spaces, recurrent=s.hidden)
    return Learner(policy, ValueHead(s.hidden), GAE(reads="policy"), [update])


WORLDS: dict[World, tuple[Callable[[Place, int, Settings], Ground], Callable[[Ground, Settings], Learner]]] = {
    "tables": (tables, tabular),
    "minigrid": (minigrid, recurrent),
}


# The arms


def explored(place: Place, bonus: Bonus, seed: int, s: Settings) -> Regimen:
    """An arm: one place under one bonus; arms of a place differ in nothing else."""
    make_ground, make_learner = WORLDS[s.world]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ground = make_ground(place, seed, s)
        learner = make_learner(ground, s)
        novelty = None if bonus == "none" else NOVELTIES[bonus](ground, s)
    # Success is that of the policy as it trains, its sampling included.
    learner.policy.knobs = (Knob("temperature", 1.0, 0.0, evaluation=1.0),)
    reward: Expression = EnvironmentReward()
    if novelty is not None:
        reward = reward + s.beta * NormalizedReward(novelty.reward, name="bonus")
    members = {} if novelty is None else novelty.members
    cast = {"policy": learner.policy, "critic": learner.critic, **members}
    stage = Stage(
        "explore",
        [ground.task],
        ground.steps,
        ground.batch,
        reward=reward,
        credit=learner.credit,
        updates=[*learner.updates, *(() if novelty is None else novelty.updates)],
        evaluate_every=max(ground.steps // 5, 1),
    )
    return Regimen(Cast(**{name: member.to(s.device) for name, member in cast.items()}), [stage])


PLACES: dict[Place, str] = {"corridors": "Corridors", "mazes": "Many mazes", "maze": "One maze"}
BONUSES: dict[Bonus, str] = {"none": "no bonus", "episodic": "episodic", "global": "global", "product": "product"}


# What is claimed


def success(seed: SeedResults, place: Place, bonus: Bonus) -> float:
    """The share of episodes in which the goal is reached, at the end."""
    return seed[f"{place}_{bonus}"].final[f"{place}/success"]


def difference(place: Place, one: Bonus, other: Bonus, seed: SeedResults) -> float:
    """One bonus minus another in one place."""
    return success(seed, place, one) - success(seed, place, other)


def shrinkage(seed: SeedResults) -> float:
    """How much larger the lead of the episodic bonus is in many mazes than in one."""
    return difference("mazes", "episodic", "global", seed) - difference("maze", "episodic", "global", seed)


def shortfall(place: Place, seed: SeedResults) -> float:
    """The product minus the better of its factors with this seed."""
    better = max(success(seed, place, "episodic"), success(seed, place, "global"))
    return success(seed, place, "product") - better


def arms_of(*places: Place, bonuses: Sequence[Bonus]) -> list[str]:
    """Names of arms."""
    return [f"{place}_{bonus}" for place in places for bonus in bonuses]


def product_keeps_up(place: Place) -> Claim:
    """The product is at most 0.1 worse than the better of its factors in one place."""
    text = f"{PLACES[place]}: product minus the better factor of the seed, within 0.1"
    arms = arms_of(place, bonuses=("product", "episodic", "global"))
    return Claim(f"product_{place}", text, partial(shortfall, place), arms, above=-0.1)


def lead(name: str, text: str, place: Place, one: Bonus, other: Bonus, judged: bool = True) -> Claim:
    """One bonus is better than another in one place."""
    value = partial(difference, place, one, other)
    return Claim(name, text, value, arms_of(place, bonuses=(one, other)), judged=judged)


PAPER = Paper(
    slug="global-episodic-bonus",
    title="A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs",
    arxiv="2306.03236",
    verb="judge",
    policy="action",
    claim="Where every episode offers the same places in the same roles, a global bonus explores better than an "
    "episodic one; where every episode is another maze, an episodic one does; their product is about as good as the "
    "better of the two in either.",
    arms=[
        Arm(f"{place}_{bonus}", f"{where}, {what}", partial(explored, place, bonus))
        for place, where in PLACES.items()
        for bonus, what in BONUSES.items()
    ],
    claims=[
        lead("global_leads", "Corridors: global minus episodic", "corridors", "global", "episodic"),
        lead("episodic_leads", "Many mazes: episodic minus global", "mazes", "episodic", "global"),
        Claim(
            "lead_shrinks",
            "Episodic minus global: many mazes minus one maze",
            shrinkage,
            arms_of("mazes", "maze", bonuses=("episodic", "global")),
        ),
        *(product_keeps_up(place) for place in PLACES),
        lead("maze_lead", "One maze: episodic minus global", "maze", "episodic", "global", judged=False),
        *(
            lead(f"{place}_gain", f"{where}: product minus no bonus", place, "product", "none", judged=False)
            for place, where in PLACES.items()
        ),
    ],
    metrics={f"{place}/success": f"success, {where.lower()}" for place, where in PLACES.items()},
    scales={
        "quick": Settings(corridor_steps=30, maze_steps=6, contexts=20),
        "default": Settings(),
        "learned": Settings(bonuses="learned"),
        "full": Settings(
            world="minigrid",
            bonuses="learned",
            learning_rate=2.5e-4,
            feature_rate=1e-4,
            device="cuda",
        ),
    },
    requires={"full": "minigrid"},
)
