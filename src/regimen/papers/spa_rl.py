"""SPA-RL (arXiv 2505.20732): a final reward given to the steps that a learned estimator of progress credits with it.

Claim: contributions that are learned from final rewards alone, in the place of the reward at the end, let PPO learn
faster from as many episodes, where the estimator fits; a gate on its held-out error says where it does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.credit import GAE, Credit, RewardRedistribution
from regimen.estimators import FitEstimator, LinearProgress, MeasureMisfit, Reading, RecordedProgress
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, ArmResult, Claim, Paper, SeedResults
from regimen.memory import HoldOut, ReplayMemory
from regimen.models.progress import ActionEncoder, PolicyEncoder, ProgressEstimator
from regimen.models.torsos import MLPTorso, torso_for
from regimen.models.value_head import ValueHead
from regimen.models.value_network import ValueNetwork
from regimen.objectives import ReferenceKL, ReturnDecompositionObjective, SFTObjective, ppo
from regimen.policies.action import ActionPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import Expression, GroundingReward, OutcomeReward
from regimen.tasks import AttributionTest, DatasetTask
from regimen.tasks.env import EnvTask
from regimen.tasks.environments.tensor import Checklist, Workshop, expert_episodes, points_and_actions
from regimen.tasks.worlds.text_games import TextGameWorld
from regimen.update import Draws, Epochs, Update

Way = Literal["terminal", "uniform", "spa", "oracle", "network", "network_ungated"]
Errand = Literal["terminal", "uniform", "leave_one_out", "spa", "spa_grounding", "terminal_grounding"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        batch: episodes in an iteration.
        explored: iterations of the checklist whose episodes an estimator is fitted to.
        steps: iterations of the checklist, those included.
        ridge: of the linear estimator.
        fit_steps, fit_batch, fit_rate: of the estimators that are networks.
        learning_rate, entropy, final_lam, step_lam: of PPO on the checklist; `lam` of GAE on a final reward, and on
            step rewards.
        gate: see `RewardRedistribution`.
        demonstrations, cloning_steps, cloning_rate: of the start in the workshop.
        workshop_explored, workshop_fit_steps, workshop_steps: iterations of exploration there, gradient steps of the
            estimator at their end, iterations of PPO after it.
        workshop_rate, workshop_lam, workshop_discount, grounding: of PPO there, and weight of the penalty.
        recurrent: width of the estimator's core there.
        model: of the text arms, a folder or a name on the Hugging Face hub; a small decoder if empty.
        games: what they play: `"guess"` a number, or `"alfworld"`.
        lora_rank, dtype: of the model.
        text_explored, text_fit_steps, text_steps, turns, text_rate, kl_weight: of those arms.
        device: where the cast of the text arms is.
    """

    batch: int = 64
    explored: int = 3
    steps: int = 40
    ridge: float = 0.3
    fit_steps: int = 400
    fit_batch: int = 64
    fit_rate: float = 1e-3
    learning_rate: float = 1e-3
    entropy: float = 0.005
    final_lam: float = 1.0
    step_lam: float = 0.95
    gate: float = 0.5
    demonstrations: int = 200
    cloning_steps: int = 35
    cloning_rate: float = 1e-3
    workshop_explored: int = 32
    workshop_fit_steps: int = 1500
    workshop_steps: int = 40
    workshop_rate: float = 3e-4
    workshop_lam: float = 0.95
    workshop_discount: float = 0.99
    grounding: float = 0.02
    recurrent: int = 64
    model: str = ""
    games: Literal["guess", "alfworld"] = "guess"
    lora_rank: int | None = None
    dtype: str = "float32"
    text_explored: int = 10
    text_fit_steps: int = 300
    text_steps: int = 40
    turns: int = 3
    text_rate: float = 1e-3
    kl_weight: float = 0.05
    device: str = "cpu"


def episodes(name: str, make: Any, limit: int, discount: float, s: Settings, **settings: Any) -> EnvTask:
    """Batches of whole episodes."""
    return EnvTask(
        name, make, copies=s.batch, steps=limit, episodes=True, discount=discount, evaluation_episodes=4 * s.batch,
        evaluation_steps=limit, **settings,
    )  # fmt: skip


def actor(task: EnvTask) -> ActionPolicy:
    """A policy that is evaluated as it trains, its sampling included."""
    policy = ActionPolicy.for_spaces(*task.spaces)
    policy.knobs = (Knob("temperature", 1.0, 0.0, evaluation=1.0),)
    return policy


def learned(rate: float, entropy: float, batches: Epochs) -> Update:
    """PPO, the same in every arm of a world."""
    return Update(ppo(entropy_weight=entropy), ["policy", "critic"], learning_rate=rate, batches=batches, name="ppo")


def network(task: EnvTask, recurrent: int | None) -> ProgressEstimator:
    """An estimator of what was seen and done in a step; with a core, in the steps before it too."""
    size = task.spaces[0].shape[0]
    encoder = ActionEncoder(MLPTorso(size, ()), int(task.spaces[1].n), recurrent=recurrent)
    return ProgressEstimator(encoder, encoder.width)


def fitting(samples: int, steps: int, s: Settings) -> Update:
    """Fits a network to final rewards, once there are as many samples; a fifth of them is kept apart."""
    draws = Draws(steps, s.fit_batch, after=samples * 4 // 5)
    return Update(ReturnDecompositionObjective(), ["estimator"], learning_rate=s.fit_rate, batches=draws, name="fit")


def kept(samples: int) -> HoldOut:
    """A memory of the exploration, of which a fifth is kept apart."""
    return HoldOut(ReplayMemory(samples), ReplayMemory(samples))


# Checklist: additive, graded reward


def checklist_credit(way: Way, s: Settings) -> Credit:
    """How the final reward is credited once there is something to credit it by."""
    final, steps = GAE(s.final_lam), GAE(s.step_lam)
    if way == "terminal":
        return final
    gate = math.inf if way == "network_ungated" else s.gate
    by = "uniform" if way == "uniform" else "estimator"
    return RewardRedistribution(by, inner=steps, gate=gate, fallback=final)


def checklist(way: Way, seed: int, s: Settings) -> Regimen:
    """An arm: the final reward in the first iterations; an estimator is fitted to them, and credits the others."""
    make = partial(Checklist, seed=seed)
    task, samples = episodes("checklist", make, 20, 1.0, s), s.explored * s.batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast: dict[str, Any] = {"policy": actor(task), "critic": ValueNetwork(torso_for(task.spaces[0]))}
        if way == "spa":
            cast["estimator"] = LinearProgress(points_and_actions, s.ridge)
        elif way == "oracle":
            cast["estimator"] = RecordedProgress("credit")
        elif way in ("network", "network_ungated"):
            cast["estimator"] = network(task, None)
    learn = learned(s.learning_rate, s.entropy, Epochs(4, 1))
    memory = kept(samples)
    stage = partial(Stage, tasks=[task], batch_size=s.batch, reward=OutcomeReward(), evaluate_every=1)
    early = checklist_credit(way if way in ("uniform", "oracle") else "terminal", s)
    updates = [learn, fitting(samples, s.fit_steps, s)] if isinstance(cast.get("estimator"), nn.Module) else [learn]
    stages = [stage("explore", steps=s.explored, credit=early, updates=updates, memory=memory)]
    if way in ("spa", "network", "network_ungated"):
        prepare: list[Any] = [MeasureMisfit()]
        if way == "spa":
            prepare.insert(0, FitEstimator("estimator", Reading(cast["estimator"].summed)))
        stages.append(stage("fit", steps=0, memory=memory, prepare=prepare))
    stages.append(stage("learn", steps=s.steps - s.explored, credit=checklist_credit(way, s), updates=[learn]))
    test = AttributionTest("attribution", episodes("attribution", make, 20, 1.0, s))
    return Regimen(Cast(**cast), stages, evaluations=[task, test])


# Workshop: ordered goals, success or none


def workshop_task(name: str, seed: int, s: Settings) -> EnvTask:
    """Episodes in groups of four with the same aim."""
    return episodes(name, partial(Workshop, seed=seed), 30, s.workshop_discount, s, siblings=4)


def workshop_regimen(seed: int, s: Settings, task: EnvTask, members: Sequence[str], stages: list[Stage]) -> Regimen:
    """Some members, in the workshop of a seed."""
    make: dict[str, Callable[[], Any]] = {
        "policy": lambda: actor(task),
        "critic": lambda: ValueNetwork(torso_for(task.spaces[0])),
        "estimator": lambda: network(task, s.recurrent),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast = {name: build() for name, build in make.items() if name in members}
    test = AttributionTest("attribution", workshop_task("attribution", seed, s))
    return Regimen(Cast(**cast), stages, evaluations=[task, test])


def cloned(seed: int, s: Settings) -> Regimen:
    """The common start: a policy cloned, for a short time, from an expert that knows where the containers stand."""
    rows = DatasetTask("demonstrations", expert_episodes(Workshop(s.demonstrations, seed=seed), seed))
    update = Update(SFTObjective("token"), learning_rate=s.cloning_rate)
    stage = Stage("clone", [rows], s.cloning_steps, 16, updates=[update])
    return workshop_regimen(seed, s, workshop_task("workshop", seed, s), ["policy"], [stage])


def fitted(seed: int, s: Settings) -> Regimen:
    """The start explores, without learning, and an estimator with memory is fitted to how episodes ended."""
    samples, task = s.workshop_explored * s.batch, workshop_task("workshop", seed, s)
    memory, update = kept(samples), fitting(samples, s.workshop_fit_steps, s)
    stage = partial(Stage, tasks=[task], batch_size=s.batch, memory=memory)
    explore = stage("explore", steps=s.workshop_explored, reward=OutcomeReward(), updates=[update])
    check = stage("check", steps=0, prepare=[MeasureMisfit()])
    return workshop_regimen(seed, s, task, ["policy", "estimator"], [explore, check])


def workshop(way: Errand, seed: int, s: Settings) -> Regimen:
    """An arm: PPO. Those that did not explore beforehand train for as many episodes more."""
    credit: Credit = GAE(s.workshop_lam)
    attributed = way in ("spa", "spa_grounding")
    if attributed or way in ("uniform", "leave_one_out"):
        by = "estimator" if attributed else way
        credit = RewardRedistribution(by, final="outcome", inner=credit, gate=s.gate)
    reward: Expression = OutcomeReward()
    if way in ("spa_grounding", "terminal_grounding"):
        reward = reward + s.grounding * GroundingReward()
    steps = s.workshop_steps + (0 if attributed else s.workshop_explored)
    update, task = learned(s.workshop_rate, s.entropy, Epochs(4, 4)), workshop_task("workshop", seed, s)
    learn = Stage(
        "learn", [task], steps, s.batch, reward=reward, credit=credit, updates=[update], evaluate_every=8
    )  # fmt: skip
    members = ["policy", "critic", "estimator"] if attributed else ["policy", "critic"]
    return workshop_regimen(seed, s, task, members, [learn])


# Text: turns of a language model


def game_world(s: Settings) -> TextGameWorld:
    """What is played, and by which model."""
    return TextGameWorld(s.games, s.model, s.turns, s.lora_rank, s.dtype)


def text_regimen(seed: int, s: Settings, members: Sequence[str], stages: Sequence[Stage]) -> Regimen:
    """A policy, and where they are asked for a critic on its states and an estimator on states of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = game_world(s).policy()
        width = policy.network.config.hidden_size
        make: dict[str, Callable[[], nn.Module]] = {
            "policy": lambda: policy,
            "critic": lambda: ValueHead(width),
            "estimator": lambda: ProgressEstimator(PolicyEncoder(copy.deepcopy(policy)), width),
        }
        cast = {name: build().to(s.device) for name, build in make.items() if name in members}
    return Regimen(Cast(**cast), stages)


def text_fitted(seed: int, s: Settings) -> Regimen:
    """The model explores, and an estimator that begins as a copy of it is fitted to how games ended."""
    samples, task = s.text_explored * s.batch, game_world(s).task("text")
    memory = kept(samples)
    update = replace(fitting(samples, s.text_fit_steps, s), micro_batch=8, learning_rate=s.fit_rate)
    explore = Stage(
        "explore", [task], s.text_explored, s.batch, reward=OutcomeReward(), memory=memory, updates=[update]
    )
    check = Stage("check", [task], 0, s.batch, memory=memory, prepare=[MeasureMisfit()])
    return text_regimen(seed, s, ["policy", "estimator"], [explore, check])


def text(way: Literal["terminal", "spa"], seed: int, s: Settings) -> Regimen:
    """PPO on turns, with a KL to where it began and a penalty for commands that did nothing."""
    credit: Credit = GAE(s.step_lam, reads="policy")
    if way == "spa":
        credit = RewardRedistribution(final="outcome", inner=credit, gate=s.gate)
    objective = ppo(reads="policy") + Knob("kl_weight", s.kl_weight, low=0.0) * ReferenceKL("k3", "token")
    update = Update(
        objective, ["policy", "critic"], learning_rate=s.text_rate, batches=Epochs(2, 4), micro_batch=8, name="ppo"
    )
    steps = s.text_steps + (0 if way == "spa" else s.text_explored)
    reward = OutcomeReward() + s.grounding * GroundingReward()
    stage = Stage(
        "learn", [game_world(s).task("text")], steps, s.batch, reward=reward, credit=credit, updates=[update],
        rules=[ReferenceRefresh(mode="fixed")],
    )  # fmt: skip
    return text_regimen(seed, s, ["policy", "critic"] + ["estimator"] * (way == "spa"), [stage])


# What is claimed


def curve(arm: ArmResult, metric: str = "checklist/return") -> list[float]:
    """A metric after every iteration that was evaluated."""
    after = {record["iterations"]: record["metrics"][metric] for record in arm.evaluations}
    return [value for iterations, value in sorted(after.items()) if iterations > 0]


def mean_return(seed: SeedResults, way: Way) -> float:
    """Mean over all iterations: how fast an arm learns."""
    values = curve(seed[f"checklist_{way}"])
    return sum(values) / len(values)


def faster(one: Way, other: Way, seed: SeedResults) -> float:
    """One arm's mean return minus another's."""
    return mean_return(seed, one) - mean_return(seed, other)


def attribution(metric: str, arm: str, seed: SeedResults) -> float:
    """What `AttributionTest` first said of an estimator, before the policy moved on."""
    found = [r["metrics"][name] for r in seed[arm].evaluations if (name := f"attribution/{metric}") in r["metrics"]]
    return float(found[0])


def finally_better(one: Errand, other: Errand, metric: str, seed: SeedResults) -> float:
    """One arm's last evaluation minus another's."""
    return seed[f"workshop_{one}"].final[f"workshop/{metric}"] - seed[f"workshop_{other}"].final[f"workshop/{metric}"]


WAYS: dict[Way, str] = {
    "terminal": "reward at the end",
    "uniform": "shared out equally",
    "spa": "SPA, linear estimator",
    "oracle": "true credit",
    "network_ungated": "SPA, bad fit, no gate",
    "network": "SPA, bad fit, gate",
}
ERRANDS: dict[Errand, str] = {
    "terminal": "reward at the end",
    "uniform": "shared out equally",
    "leave_one_out": "leave-one-out on each step",
    "spa": "SPA",
    "spa_grounding": "SPA and grounding",
    "terminal_grounding": "reward at the end and grounding",
}


def lead(one: Way, other: Way, judged: bool = True, above: float = 0.0) -> Claim:
    """One arm learns faster than another on the checklist."""
    text = f"Checklist, mean return of all iterations: {WAYS[one]} minus {WAYS[other]}"
    arms = [f"checklist_{one}", f"checklist_{other}"]
    return Claim(f"{one}_{other}", text, partial(faster, one, other), arms, above, judged)


def end(one: Errand, other: Errand, metric: str = "success") -> Claim:
    """One arm ends better than another in the workshop, after as many episodes."""
    text = f"Workshop, {metric.replace('_', ' ')} at the end: {ERRANDS[one]} minus {ERRANDS[other]}"
    arms = [f"workshop_{one}", f"workshop_{other}"]
    value = partial(finally_better, one, other, metric)
    return Claim(f"workshop_{metric}_{one}_{other}", text, value, arms, judged=False)


def said(name: str, text: str, arm: str, metric: str, above: float, judged: bool = False) -> Claim:
    """What an estimator's first test said, before the policy moved on."""
    return Claim(name, text, partial(attribution, metric, arm), [arm], above, judged)


PAPER = Paper(
    slug="spa-rl",
    title="SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution",
    arxiv="2505.20732",
    verb="credit",
    policy="action",
    claim="Where rewards come at the end and an estimator of progress fits them, PPO on its contributions to each step "
    "learns faster than PPO on the reward at the end, or shared out equally, from as many episodes; the contributions "
    "are then the true credit.",
    arms=[
        *(Arm(f"checklist_{way}", f"Checklist, {title}", partial(checklist, way)) for way, title in WAYS.items()),
        Arm("workshop_cloned", "Workshop, cloned start", cloned, cached=True),
        Arm("workshop_fitted", "Workshop, explored and fitted", fitted, start="workshop_cloned"),
        *(
            Arm(
                f"workshop_{way}",
                f"Workshop, {title}",
                partial(workshop, way),
                start="workshop_fitted" if way in ("spa", "spa_grounding") else "workshop_cloned",
            )
            for way, title in ERRANDS.items()
        ),
        Arm("text_terminal", "Text, reward at the end", partial(text, "terminal"), extended=True),
        Arm("text_fitted", "Text, explored and fitted", text_fitted, extended=True),
        Arm("text_spa", "Text, SPA", partial(text, "spa"), start="text_fitted", extended=True),
    ],
    claims=[
        lead("spa", "terminal"),
        lead("spa", "uniform"),
        said("credit", "Checklist: correlation with true credit", "checklist_spa", "correlation", 0.9, judged=True),
        lead("spa", "oracle", judged=False),
        lead("terminal", "network_ungated", judged=False),
        lead("network", "network_ungated", judged=False),
        lead("network", "terminal", judged=False),
        said("network_misfit", "Checklist: misfit of the network", "checklist_network", "misfit", 0.5),
        end("spa", "uniform"),
        end("spa", "leave_one_out"),
        end("spa", "terminal"),
        end("spa_grounding", "spa"),
        end("terminal_grounding", "terminal"),
        end("terminal_grounding", "terminal", "valid_share"),
        said("workshop_credit", "Workshop: correlation with true credit", "workshop_fitted", "correlation", 0.9),
        said("workshop_misfit", "Workshop: misfit", "workshop_fitted", "misfit", 0.5),
    ],
    metrics={
        "checklist/return": "return, checklist",
        "workshop/success": "success, workshop",
        "workshop/valid_share": "share of valid actions, workshop",
        "attribution/misfit": "misfit on the policy's own episodes",
        "attribution/correlation": "correlation with true credit",
        "text/success": "success, text",
    },
    scales={
        "quick": Settings(
            batch=16,
            steps=5, fit_steps=20, cloning_steps=10, workshop_explored=3, workshop_fit_steps=20, workshop_steps=3,
            recurrent=16, text_explored=2, text_fit_steps=5, text_steps=2,
        ),
        "default": Settings(),
        "full": Settings(
            model="meta-llama/Llama-3.2-3B-Instruct", games="alfworld", lora_rank=8, dtype="bfloat16", device="cuda",
            text_explored=160, text_fit_steps=2000, text_steps=200, turns=35, text_rate=1e-6, fit_rate=3e-6,
        ),
    },
    requires={"full": "peft"},
)  # fmt: skip
