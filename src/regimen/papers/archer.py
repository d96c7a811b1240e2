"""ArCHer (arXiv 2402.19446): an off-policy critic of utterances, and a policy gradient of tokens within each.

Claim: a critic of whole utterances, learned from the replay of all turns so far, reaches a return with clearly fewer
episodes than a policy gradient of single tokens over the same dialogues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from regimen.cast import Cast, ReferenceRefresh
from regimen.controllers import Piecewise, Schedule
from regimen.credit import GAE, CriticAdvantage
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import Memory, NewestRollout, ReplayMemory
from regimen.models.double_critic import DoubleCritic
from regimen.models.value_head import ValueHead
from regimen.objectives import DoubleCriticObjective, ReinforceObjective, Resampled, SFTObjective, ValueObjective, ppo
from regimen.policies.utterances import UtterancePolicy, as_token_steps
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, DialogueTask, UtteranceTask
from regimen.tasks.worlds.questioners import Questioners
from regimen.update import Draws, Epochs, Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        attributes, turns: of the game, see `TwentyQuestions`.
        model, encoder: names of a pre-trained policy and of the critic's encoder; small decoders if empty.
        dim, layers: of small decoders; context: tokens of the history that the critic reads.
        demonstrations, imitation_steps, imitation_rate: the common start, dialogues of a half-random questioner.
        episodes, iterations: dialogues collected in an iteration, in every arm, and iterations.
        evaluations, evaluate_every: sampled dialogues of an evaluation, and iterations between two.
        critic_steps, critic_rate, batch, actor_steps, actor_rate, actor_batch: of ArCHer, an iteration's.
        warm_up, warm_up_steps: first iterations, in which the critic learns alone, and its steps in each of them.
        discount, tau, capacity: of the critic; reward_scale: what rewards are multiplied by in every arm.
        ppo_epochs, ppo_minibatches, ppo_rate, ppo_lam, ppo_entropy: of token PPO.
        filtered_steps, filtered_rate, best: of filtered imitation, and the share of dialogues that are imitated.
        device, micro_batch: where it is trained, and samples per backward pass.
    """

    attributes: int = 3
    turns: int = 8
    model: str = ""
    encoder: str = ""
    dim: int = 32
    layers: int = 2
    context: int = 32
    demonstrations: int = 400
    imitation_steps: int = 100
    imitation_rate: float = 2e-3
    episodes: int = 32
    iterations: int = 16
    evaluations: int = 200
    evaluate_every: int = 2
    critic_steps: int = 20
    critic_rate: float = 1e-3
    batch: int = 64
    actor_steps: int = 6
    actor_rate: float = 5e-4
    actor_batch: int = 128
    warm_up: int = 1
    warm_up_steps: int = 60
    discount: float = 0.95
    tau: float = 0.1
    capacity: int = 5_000
    reward_scale: float = 0.1
    ppo_epochs: int = 4
    ppo_minibatches: int = 2
    ppo_rate: float = 1e-3
    ppo_lam: float = 0.95
    ppo_entropy: float = 0.0
    filtered_steps: int = 10
    filtered_rate: float = 1e-3
    best: float = 0.1
    device: str = "cpu"
    micro_batch: int | None = None


class Parts:
    """The game, who plays it, and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings, s = settings, settings
        self.world = Questioners(seed, s.attributes, s.turns, s.model, s.encoder, s.dim, s.layers)
        self.policy = self.world.policy().to(s.device)
        self.task: DialogueTask = self.world.game(s.discount, s.evaluations)

    def regimen(self, stage: Stage, **members: Any) -> Regimen:
        """A regimen of one stage, evaluated by sampled dialogues."""
        return Regimen(Cast(policy=self.policy, **members), [stage], evaluations=[self.task])

    def stage(self, name: str, task: Any, updates: Sequence[Update], **verbs: Any) -> Stage:
        """A stage that collects as much as every other."""
        s = self.settings
        return Stage(
            name, [task], s.iterations, s.episodes, s.reward_scale * EnvironmentReward(), updates=updates,
            evaluate_every=s.evaluate_every, **verbs,
        )  # fmt: skip

    def update(self, objective: Any, members: Sequence[str], rate: float, batches: Any, **more: Any) -> Update:
        """An update with Adam."""
        return Update(
            objective, members, rate, torch.optim.Adam, batches=batches, micro_batch=self.settings.micro_batch, **more
        )


def base(seed: int, s: Settings) -> Regimen:
    """The common start: imitation of somebody who asks at random half of the time."""
    parts = Parts(seed, s)
    task = DatasetTask("demonstrations", parts.world.demonstrations(parts.policy, parts.task, s.demonstrations))
    update = parts.update(SFTObjective(), ["policy"], s.imitation_rate, Epochs())
    return parts.regimen(Stage("imitate", [task], s.imitation_steps, 64, updates=[update]))


def less_expected(rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
    """Utterances as tokens, with the critic's advantage less what a baseline expects of it before each token.

    The baseline's target is the advantage itself (the paper's optional baseline of tokens).
    """
    tokens = as_token_steps(CriticAdvantage()(rollout, knobs, cast))
    advantage = tokens.advantages
    with torch.no_grad():
        expected = cast["baseline"](cast["policy"].distribution(tokens).hidden)
    less = tokens.replace(advantages=torch.where(tokens.loss_mask, advantage - expected, 0))
    return less.with_step_columns(value_target=advantage)


def lower_level(baseline: bool) -> Resampled:
    """Of fresh utterances: the gradient of their tokens, with a baseline for each token or with none."""
    if not baseline:
        return Resampled(ReinforceObjective("token", member="speaker"), CriticAdvantage(), "speaker")
    loss = ReinforceObjective("constant", 1) + ValueObjective(member="baseline", reads="policy")
    return Resampled(loss, less_expected, "speaker")


def warmed(s: Settings, first: int, then: int) -> Piecewise:
    """Steps during the warm-up, and after it."""
    return Piecewise([(0, first), (s.warm_up, then)] if s.warm_up else [(0, then)])


def archer(memory: Callable[[Settings], Memory], seed: int, s: Settings, baseline: bool = False) -> Regimen:
    """The method: a critic of utterances from replay, then a gradient of the tokens of new ones in the same states."""
    parts = Parts(seed, s)
    head = {"baseline": ValueHead(parts.policy.network.config.hidden_size).to(s.device)} if baseline else {}
    evaluate = parts.update(
        DoubleCriticObjective(policy="speaker"),
        ["critic"],
        s.critic_rate,
        Draws(Knob("steps/critic", s.critic_steps, 0, integer=True), s.batch),
        rules=[ReferenceRefresh("critic_target", of="critic", mode="ema", decay=1 - s.tau)],
    )
    improve = parts.update(
        lower_level(baseline),
        ["policy", *head],
        s.actor_rate,
        Draws(Knob("steps/policy", s.actor_steps, 0, integer=True), s.actor_batch),
    )
    stage = parts.stage(
        "archer",
        UtteranceTask(parts.task, context=s.context),
        [evaluate, improve],
        memory=partial(memory, s),
        controllers=[
            Schedule("steps/critic", warmed(s, s.warm_up_steps, s.critic_steps)),
            Schedule("steps/policy", warmed(s, 0, s.actor_steps)),
        ],
        prepare=[parts.world.reads_like_policy],
    )
    torso = parts.world.torso(parts.policy)
    critic = DoubleCritic(torso, torso, s.dim).to(s.device)
    return parts.regimen(stage, critic=critic, speaker=UtterancePolicy(parts.policy), **head)


def replayed(s: Settings) -> Memory:
    """All turns so far, the oldest forgotten when it is full."""
    return ReplayMemory(s.capacity, "transition")


def newest(s: Settings) -> Memory:
    """The turns of the newest dialogues only."""
    return NewestRollout("step")


def baselined(seed: int, s: Settings) -> Regimen:
    """ArCHer with the paper's optional baseline of tokens."""
    return archer(replayed, seed, s, baseline=True)


def token_ppo(seed: int, s: Settings) -> Regimen:
    """One level: PPO over all tokens of a dialogue, with a critic on the policy's states."""
    parts = Parts(seed, s)
    loss = ppo(entropy_weight=s.ppo_entropy, reads="policy")
    update = parts.update(loss, ["policy", "critic"], s.ppo_rate, Epochs(s.ppo_epochs, s.ppo_minibatches))
    stage = parts.stage("ppo", parts.task, [update], credit=GAE(s.ppo_lam, reads="policy"))
    return parts.regimen(stage, critic=ValueHead(parts.policy.network.config.hidden_size).to(s.device))


def filtered(seed: int, s: Settings) -> Regimen:
    """Imitation of the best dialogues so far."""
    parts = Parts(seed, s)
    draws = Draws(s.filtered_steps, s.episodes, best=s.best)
    update = parts.update(SFTObjective(), ["policy"], s.filtered_rate, draws)
    return parts.regimen(parts.stage("filtered", parts.task, [update], memory=partial(ReplayMemory, s.capacity)))


def area(arm: str, seed: SeedResults) -> float:
    """Mean return over all evaluations, the first included: the area under the curve."""
    curve = [record["metrics"]["game/return"] for record in seed[arm].evaluations]
    return sum(curve) / len(curve)


def ahead(arm: str, other: str, seed: SeedResults) -> float:
    """Area under one arm's curve minus that under another's."""
    return area(arm, seed) - area(other, seed)


def better(name: str, text: str, arm: str, other: str, judged: bool = False) -> Claim:
    """One arm's curve lies above another's."""
    return Claim(name, text, partial(ahead, arm, other), [arm, other], judged=judged)


def critic_finds(seed: SeedResults) -> float:
    """Return at the end minus that of the common start."""
    return seed["archer"].final["game/return"] - seed["base"].final["game/return"]


TRAINED = (
    *("iterations", "evaluate_every", "critic_steps", "critic_rate", "batch", "actor_steps", "actor_rate"),
    *("actor_batch", "warm_up", "warm_up_steps", "tau", "capacity", "reward_scale", "ppo_epochs", "ppo_minibatches"),
    *("ppo_rate", "ppo_lam", "ppo_entropy", "filtered_steps", "filtered_rate", "best", "episodes", "context"),
)
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="archer",
    title="ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL",
    arxiv="2402.19446",
    verb="learn",
    policy="token",
    claim="On a multi-turn task, a critic of whole utterances that learns from all turns so far, above a policy "
    "gradient of tokens within each new utterance, reaches a return with clearly fewer dialogues than token PPO.",
    arms=[
        Arm("base", "base (imitation)", base, cached=True, ignores=TRAINED),
        Arm("archer", "ArCHer", partial(archer, replayed), start="base"),
        Arm("newest", "ArCHer, critic of the newest dialogues only", partial(archer, newest), start="base"),
        Arm("baseline", "ArCHer, baseline of tokens", baselined, start="base", extended=True),
        Arm("ppo", "token PPO", token_ppo, start="base"),
        Arm("filtered", "filtered imitation", filtered, start="base"),
    ],
    claims=[
        better("above_ppo", "Mean return over training: ArCHer minus token PPO", "archer", "ppo", True),
        better("above_newest", "Mean return over training: replayed critic minus newest only", "archer", "newest"),
        better("above_filtered", "Mean return over training: ArCHer minus filtered imitation", "archer", "filtered"),
        Claim("gain", "Return at the end: ArCHer minus its start", critic_finds, ["archer", "base"], judged=False),
    ],
    metrics={
        "game/return": "return",
        "game/success": "right within the turns",
        "game/turns": "turns",
    },
    scales={
        "quick": Settings(
            attributes=2,
            turns=4,
            dim=16,
            demonstrations=60,
            imitation_steps=10,
            episodes=12,
            iterations=5,
            evaluations=8,
            critic_steps=4,
            batch=16,
            actor_batch=16,
            warm_up=2,
            warm_up_steps=4,
            capacity=500,
        ),
        "default": Settings(),
        "full": Settings(
            attributes=6,
            turns=20,
            model="gpt2",
            encoder="roberta-base",
            context=512,
            demonstrations=5000,
            imitation_steps=500,
            imitation_rate=1e-5,
            episodes=128,
            iterations=150,
            evaluate_every=10,
            critic_steps=50,
            critic_rate=2e-5,
            batch=256,
            actor_steps=3,
            actor_rate=1e-5,
            actor_batch=256,
            warm_up=20,
            warm_up_steps=50,
            capacity=100_000,
            ppo_rate=1e-5,
            filtered_rate=1e-5,
            device="cuda",
            micro_batch=32,
        ),
    },
)
