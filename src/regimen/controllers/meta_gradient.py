"""The weight between imitation and reinforcement, learned from held-out reward and an entropy target (AMFT)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.controllers.base import Insight, Moment, Needs, Probe, Situation

Normalize = Literal["cosine", "none"]


def meta_gradient(
    val_grad: Tensor, sft_grad: Tensor, rl_grad: Tensor, lr: float = 1.0, normalize: Normalize = "cosine"
) -> float:
    """How the held-out gain rises with the weight `mu` of imitation.

    After an inner step `theta' = theta - lr * (mu * g_S + (1 - mu) * g_R)` the derivative of `-L_val(theta')` with
    respect to `mu` is `lr * <grad L_val(theta'), g_S - g_R>`: positive where a step along imitation lowers the held-out
    loss more than one along reinforcement. Source: AMFT (arXiv 2508.06944), whose text has this sign; its released code
    has the other.

    Args:
        val_grad: `[P]`, the gradient of the held-out *loss*; at `theta'`, or at `theta` as a first-order approximation.
        sft_grad, rl_grad: `[P]`, gradients of the two losses before their weights.
        lr: the inner step's; without effect on the cosine.
        normalize: `"cosine"` divides by both norms, so that the result is in [-1, 1]; `"none"` is the derivative.

    Raises:
        ValueError: unequal shapes, or an unknown setting.
    """
    if not val_grad.shape == sft_grad.shape == rl_grad.shape or val_grad.ndim != 1:
        shapes = ", ".join(str(list(gradient.shape)) for gradient in (val_grad, sft_grad, rl_grad))
        raise ValueError(f"meta_gradient: gradients have shapes {shapes}; expected one shape [P]")
    if normalize not in get_args(Normalize):
        raise ValueError(f"meta_gradient: normalize '{normalize}' is not one of {', '.join(get_args(Normalize))}")
    difference = sft_grad - rl_grad
    along = float(val_grad @ difference)
    if normalize == "none":
        return lr * along
    return along / (float(val_grad.norm() * difference.norm()) + 1e-12)


def mixed_weight_step(
    mu: float,
    mg: float,
    entropy: float,
    target: float,
    *,
    meta_lr: float,
    entropy_lr: float,
    low: float = 0.05,
    high: float = 0.95,
) -> float:
    """`clip(mu + meta_lr * mg + entropy_lr * (target - entropy), low, high)` (AMFT).

    The weight of imitation rises where the policy's entropy has fallen below its target.

    Args:
        mu: the weight so far.
        mg: see `meta_gradient`.
        entropy, target: mean entropy per token, in nats, and what it should be.
        meta_lr, entropy_lr: step sizes.
        low, high: bounds of the weight.
    """
    return min(max(mu + meta_lr * mg + entropy_lr * (target - entropy), low), high)


class MetaGradientWeight:
    """Moves the weight `mu` of imitation in a loss `mu * imitation + (1 - mu) * reinforcement`, before each learning.

    Every `every` iterations by the meta-gradient on a probe, in all by the gap of the policy's entropy to a target.
    A step of which any number is not finite leaves the weight alone, and the metric `mu_skipped` says so.

    Metrics: `adapt/meta_gradient`, `adapt/meta_move`, `adapt/entropy`, `adapt/entropy_move` (both moves before the
    bounds), `adapt/mu_skipped`.
    """

    moment: Moment = "before_learn"

    def __init__(
        self,
        knob: str,
        probe: Probe | None,
        *,
        update: str = "policy",
        imitation: str = "sft",
        reinforcement: str = "surrogate+entropy",
        entropy: str = "entropy",
        low: float = 0.05,
        high: float = 0.95,
        meta_lr: float = 0.02,
        entropy_lr: float = 0.01,
        every: int = 10,
        normalize: Normalize = "cosine",
        lookahead: bool = False,
        inner_lr: float = 1e-3,
        target_entropy: float | None = None,
    ) -> None:
        """Make the controller.

        Args:
            knob: the weight; its value when the stage starts is where it begins.
            probe: held-out samples with the objective whose gradient is the held-out loss's: `ReinforceObjective` on
                judged and credited answers, or `SFTObjective` on demonstrations. `None` if `meta_lr` is 0.
            update: whose loss it is.
            imitation, reinforcement, entropy: losses of that update by name, see `Needs`.
            low, high: bounds of the weight.
            meta_lr, entropy_lr: step sizes, at least 0; of 0, what they weight is not computed.
            every: iterations between meta-gradients.
            normalize: see `meta_gradient`.
            lookahead: probe after an inner step of `inner_lr` instead of before.
            inner_lr: of the inner step.
            target_entropy: in nats; left to `TargetEntropy` if `None`.

        Raises:
            ValueError: a setting is out of range, or a meta-gradient has no probe.
        """
        if not 0 <= low <= high <= 1 or min(meta_lr, entropy_lr) < 0 or every < 1 or inner_lr <= 0:
            raise ValueError(
                f"MetaGradientWeight: low={low}, high={high}, meta_lr={meta_lr}, entropy_lr={entropy_lr}, "
                f"every={every}, inner_lr={inner_lr}; expected 0 <= low <= high <= 1, rates of at least 0, every >= 1 "
                "and inner_lr > 0"
            )
        if normalize not in get_args(Normalize):
            raise ValueError(
                f"MetaGradientWeight: normalize '{normalize}', expected {' or '.join(get_args(Normalize))}"
            )
        if meta_lr > 0 and (probe is None or probe.objective is None):
            raise ValueError(
                f"MetaGradientWeight: meta_lr is {meta_lr}, and the held-out loss is missing; give it "
                "Probe(..., objective=...), or meta_lr=0"
            )
        self.knob, self.low, self.high = knob, low, high
        self.meta_lr, self.entropy_lr, self.every = meta_lr, entropy_lr, every
        self.normalize, self.lookahead, self.inner_lr = normalize, lookahead, inner_lr
        self.imitation, self.reinforcement, self.entropy = imitation, reinforcement, entropy
        wanted = (imitation, reinforcement) * (meta_lr > 0) + (entropy,) * (entropy_lr > 0)
        self.needs = Needs(update, wanted, probe if meta_lr > 0 else None)
        self.target_entropy = target_entropy

    @property
    def moves(self) -> tuple[str, ...]:
        """The weight."""
        return (self.knob,)

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """The weight for this iteration's gradient steps.

        Raises:
            ValueError: it begins outside its bounds.
            RuntimeError: there is no target for the entropy, or nothing to take gradients from.
        """
        mu, insight = situation.knobs[self.knob], situation.insight
        if not self.low <= mu <= self.high:
            raise ValueError(
                f"MetaGradientWeight: knob '{self.knob}' is {mu}, expected within [{self.low}, {self.high}]; start it "
                "inside its bounds"
            )
        if insight is None:
            raise RuntimeError("MetaGradientWeight was shown no gradients; it acts within a stage's iteration")
        entropy, target = self._entropies(insight)
        mg = self._meta_gradient(mu, insight) if self.meta_lr > 0 and situation.step % self.every == 0 else 0.0
        moved = mixed_weight_step(
            mu, mg, entropy, target,
            meta_lr=self.meta_lr, entropy_lr=self.entropy_lr, low=self.low, high=self.high,
        )  # fmt: skip
        skipped = not (math.isfinite(mg) and math.isfinite(entropy))
        situation.notes["mu_skipped"] = float(skipped)
        if skipped:
            return {self.knob: mu}
        moves = {"meta_move": self.meta_lr * mg, "entropy_move": self.entropy_lr * (target - entropy)}
        situation.notes.update({"meta_gradient": mg, "entropy": entropy, **moves})
        return {self.knob: moved}

    def _entropies(self, insight: Insight) -> tuple[float, float]:
        """The policy's now and the target; of no interest if nothing is learned from them."""
        if self.entropy_lr == 0:
            return 0.0, 0.0
        if self.target_entropy is None:
            raise RuntimeError("target entropy not set; give the stage prepare=[TargetEntropy(...)], or a number")
        return insight.losses(self.entropy)[self.entropy], self.target_entropy

    def _meta_gradient(self, mu: float, insight: Insight) -> float:
        found = insight.gradients(self.imitation, self.reinforcement)
        sft, rl = found[self.imitation], found[self.reinforcement]
        step = -self.inner_lr * (mu * sft + (1 - mu) * rl)
        with insight.moved(step) if self.lookahead else nullcontext():
            val = insight.probe_gradient(insight.probe())
        return meta_gradient(val, sft, rl, self.inner_lr, self.normalize)

    def state_dict(self) -> dict[str, Any]:
        """The target."""
        return {"target_entropy": self.target_entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.target_entropy = state["target_entropy"]


@dataclass(frozen=True)
class TargetEntropy:
    """A `prepare` step: a controller's target is the policy's entropy on a task's samples when the stage starts.

    It is the mean over the steps that are learned from, in nats. The task's place in its data stays where it was, and
    the random stream of training is not drawn from.

    Attributes:
        controller: whose target it is.
        task: name of the stage's task (of demonstrations).
        batches, size: samples that it is measured on, `batches * size`.
        member: the policy.
    """

    controller: MetaGradientWeight
    task: str = "demonstrations"
    batches: int = 20
    size: int = 32
    member: str = "policy"

    @torch.no_grad()
    def __call__(self, cast: Mapping[str, Any], tasks: Sequence[Any], memory: Any) -> None:
        """Measure and set it."""
        task = next((task for task in tasks if task.name == self.task), None)
        if task is None:
            raise ValueError(f"TargetEntropy: the stage has no task '{self.task}': {', '.join(t.name for t in tasks)}")
        state, policy = task.state_dict(), cast[self.member]
        rng = torch.Generator(next(policy.parameters()).device).manual_seed(0)
        total, count = 0.0, 0
        for _ in range(self.batches):
            rollout = task.collect(cast, {}, rng, self.size)
            total += float(policy.distribution(rollout, rollout.loss_mask).entropy().sum())
            count += int(rollout.loss_mask.sum())
        task.load_state_dict(state)
        self.controller.target_entropy = total / max(count, 1)
