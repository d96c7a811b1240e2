"""Rectified-flow policies: a denoising step of the stochastic sampler is a decision step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.functions.flow import (
    Reduce,
    expand_as,
    flow_sde_coefficients,
    gaussian_logprob,
    predicted_data,
    shifted_sigmas,
)
from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree


class Denoiser(Protocol):
    """A network that predicts the velocity `noise - data` of noisy samples."""

    def __call__(self, x: Tensor, sigma: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Velocity `[B, ...]` at states `x [B, ...]` and times `sigma [B]`."""
        ...

    def unconditional(self, context: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The context with its prompt replaced by the null prompt (reference images stay)."""
        ...


@dataclass(frozen=True)
class GaussianSteps:
    """The Gaussian of every recorded denoising step (a `StepDistribution`).

    Attributes:
        where: bool `[B, T]`, the `R` steps that are described, in row order.
        action, mean: `[R, ...]`; std: `[R]`; duration: `[R]`, `|dt|` of the step.
        reduce: how a log-density or divergence is reduced over a state's dimensions.
    """

    where: Tensor
    action: Tensor
    mean: Tensor
    std: Tensor
    duration: Tensor
    reduce: Reduce

    @property
    def logprob(self) -> Tensor:
        """`[B, T]`, reduced over a state's dimensions as `reduce` says."""
        return self._spread(gaussian_logprob(self.action, self.mean, expand_as(self.std, self.mean), self.reduce))

    def entropy(self) -> Tensor:
        """`[B, T]`; it depends on the sampler alone, so it has no gradient."""
        dimensions = self.mean.shape[1:].numel() if self.reduce == "sum" else 1
        nats = 0.5 * torch.log(2 * torch.pi * torch.e * self.std.square())
        return self._spread(dimensions * nats)

    def kl(self, other: GaussianSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL between two policies at the same states, reduced as `reduce` says.

        `"exact"` is `(mean - mean')^2 / (2 std^2)`; `"flow_grpo"` is that times `|dt|`, the form of the public
        Flow-GRPO trainer.
        """
        per_dim = ((self.mean - other.mean) / expand_as(self.std, self.mean)).square().flatten(1) / 2
        exact = per_dim.mean(1) if self.reduce == "mean" else per_dim.sum(1)
        if estimator == "exact":
            return self._spread(exact)
        if estimator == "flow_grpo":
            return self._spread(exact * self.duration)
        raise ValueError(f"KL estimator '{estimator}' is not known to a flow policy; expected exact or flow_grpo")

    def _spread(self, values: Tensor) -> Tensor:
        return torch.zeros(self.where.shape, device=values.device).masked_scatter(self.where, values)


class FlowPolicy(nn.Module):
    """A denoiser as a policy: `sample` runs the ODE or the SDE, `distribution` scores the steps taken.

    A rollout's observations are the states `x_0 .. x_{T-1}`, its actions the states that followed; columns are
    `sigmas [B, T + 1]` and `image`, the decoded last state. The last step has `loss_mask` False: it still adds
    noise, and Flow-GRPO leaves it out of the loss.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        shape: tuple[int, ...],
        *,
        conditioner: nn.Module | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        shift: float = 1.0,
        logprob_reduce: Reduce = "mean",
        sampling_steps: int = 10,
        evaluation_steps: int = 40,
        noise_level: float = 0.7,
        guidance: float = 1.0,
    ) -> None:
        """Make a policy of a denoiser.

        Args:
            denoiser: a module that is a `Denoiser`.
            shape: a sample's own shape, `[C, H, W]` or any other.
            conditioner: maps contexts to what the denoiser reads, once per sample (text encoders, a connector).
            decode: maps last states to images (a VAE's decoder); the identity by default.
            shift: of the sampling grid, see `shifted_sigmas`.
            logprob_reduce: "mean" or "sum" over a state's dimensions; with "mean" a clip range of 1e-4 to 1e-3
                is sensible, with "sum" 0.1 to 0.2.
            sampling_steps, evaluation_steps: steps in training and in evaluation.
            noise_level: of the stochastic sampler in training; evaluation always runs the ODE.
            guidance: classifier-free guidance scale; 1 is none.
        """
        super().__init__()
        self.denoiser, self.conditioner, self.decode = denoiser, conditioner, decode
        self.shape, self.shift, self.logprob_reduce = tuple(shape), shift, logprob_reduce
        self.knobs = (
            Knob("sampling_steps", sampling_steps, 1, integer=True, evaluation=evaluation_steps),
            Knob("noise_level", noise_level, 0.0, evaluation=0.0),
            Knob("guidance", guidance, 0.0),
        )
        self.version = 0

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.parameters()).device

    def condition(self, context: TensorDict) -> TensorDict:
        """What the denoiser reads for these contexts, one row per sample."""
        if self.conditioner is None:
            return context
        return TensorDict(self.conditioner(context), batch_size=context.batch_size)

    def velocity(
        self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor | float = 1.0
    ) -> Tensor:
        """Guided velocity `[R, ...]`: `v_null + guidance (v - v_null)`; the null branch carries no gradient."""
        denoiser = cast(Denoiser, self.denoiser)
        velocity = denoiser(x, sigma, conditioning).float()
        if not isinstance(guidance, Tensor):
            if guidance == 1:
                return velocity
            guidance = torch.full((len(x),), guidance, device=x.device)
        elif bool((guidance == 1).all()):
            return velocity
        with torch.no_grad():
            null = denoiser(x, sigma, denoiser.unconditional(conditioning)).float()
        return null + expand_as(guidance, x) * (velocity - null)

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One sample per context; behaviour log-probabilities only where `noise_level` is above 0."""
        batch, steps, level = len(contexts), int(knobs["sampling_steps"]), knobs["noise_level"]
        sigmas = shifted_sigmas(steps, self.shift)
        # In single precision, as the rollout records it, so that scoring repeats these coefficients to the bit.
        recorded = torch.tensor(level, dtype=sigmas.dtype)
        coefficients = flow_sde_coefficients(sigmas[:-1], sigmas[1:], recorded, float(sigmas[1]))
        keep, drift, std = (c.tolist() for c in coefficients)
        states = torch.empty(batch, steps + 1, *self.shape, device=self.device)
        means = torch.empty(batch, steps, *self.shape, device=self.device) if level > 0 else None
        x = torch.randn(batch, *self.shape, generator=rng, device=self.device)
        states[:, 0] = x
        conditioning = self.condition(contexts)
        for i, sigma in enumerate(sigmas[:-1].tolist()):
            times = torch.full((batch,), sigma, device=self.device)
            velocity = self.velocity(x, times, conditioning, knobs["guidance"])
            x = keep[i] * x + drift[i] * velocity
            if means is not None:
                means[:, i] = x
                x = x + std[i] * torch.randn(x.shape, generator=rng, device=self.device)
            states[:, i + 1] = x
        return self._rollout(contexts, knobs, states, means, sigmas, torch.tensor(std))

    def _rollout(
        self,
        contexts: TensorDict,
        knobs: Mapping[str, float],
        states: Tensor,
        means: Tensor | None,
        sigmas: Tensor,
        std: Tensor,
    ) -> Rollout:
        batch, steps = states.shape[0], len(std)
        mask = torch.ones(batch, steps, dtype=torch.bool, device=self.device)
        loss_mask = mask.clone()
        loss_mask[:, -1] = steps == 1
        image = states[:, -1] if self.decode is None else self.decode(states[:, -1])
        scored = {}
        if means is not None:
            deviation = std.to(self.device).repeat(batch)
            scored["logprobs"] = gaussian_logprob(
                states[:, 1:].flatten(0, 1), means.flatten(0, 1), expand_as(deviation, means.flatten(0, 1)),
                self.logprob_reduce,
            ).view(batch, steps)  # fmt: skip
        return Rollout.create(
            task="policy",
            group=torch.arange(batch, device=self.device),
            mask=mask,
            loss_mask=loss_mask,
            context=contexts,
            knobs=knobs,
            columns={"sigmas": sigmas.to(self.device).expand(batch, -1), "image": image},
            version=torch.full((batch,), self.version, device=self.device),
            observations=states[:, :-1],
            actions=states[:, 1:],
            **scored,
        )

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> GaussianSteps:
        """The Gaussian of each step at the recorded states, under this policy's weights.

        Raises:
            ValueError: the rollout was sampled with noise level 0, or holds no states.
        """
        if rollout.observations is None:
            raise ValueError("FlowPolicy.distribution: the rollout holds no states (observations); sample it first")
        level = rollout.knobs["noise_level"]
        if bool((level <= 0).any()):
            raise ValueError(
                "FlowPolicy.distribution: the rollout was sampled with knob noise_level = 0 (the ODE), whose steps "
                "have no log-probability; set noise_level > 0 for training, or use an objective that needs none"
            )
        where = rollout.mask if where is None else where
        row, step = where.nonzero(as_tuple=True)
        sigmas = rollout["sigmas"]
        sigma, sigma_next = sigmas[row, step], sigmas[row, step + 1]
        keep, drift, std = flow_sde_coefficients(sigma, sigma_next, level[row], sigmas[row, 1])
        x = rollout.observations[row, step]
        conditioning = self.condition(rollout.context)[row]
        velocity = self.velocity(x, sigma, conditioning, rollout.knobs["guidance"][row])
        mean = expand_as(keep, x) * x + expand_as(drift, x) * velocity
        return GaussianSteps(where, rollout.actions[row, step], mean, std, sigma - sigma_next, self.logprob_reduce)

    def reparameterised(self, rollout: Rollout, rng: torch.Generator) -> Rollout:
        """The samples as a differentiable function of the weights: each is predicted in one step from a recorded state.

        `image` becomes the decoded `x - sigma v(x, sigma, c)` at the one step of each sample that is learned from, as
        `learned_once` leaves it. The states were recorded without a graph, so the gradient reaches the weights through
        that step alone (ReFL, Xu et al. 2023).

        Raises:
            ValueError: a sample is learned from at no step, or at several.
        """
        learned = rollout.loss_mask.sum(1)
        if bool((learned != 1).any()):
            raise ValueError(
                f"FlowPolicy.reparameterised: a sample of task {'/'.join(rollout.task_names)} is learned from at "
                f"{int(learned[learned != 1][0])} steps, expected 1; give SideBySide or learned_once the rollout"
            )
        row = torch.arange(len(rollout), device=learned.device)
        step = rollout.loss_mask.int().argmax(1)
        x, sigma = rollout.observations[row, step], rollout["sigmas"][row, step]
        velocity = self.velocity(x, sigma, self.condition(rollout.context), rollout.knobs["guidance"])
        image = predicted_data(x, velocity, sigma)
        return rollout.with_columns(image=image if self.decode is None else self.decode(image))

    def logprob(self, rollout: Rollout) -> Tensor:
        """Differentiable log-probability `[B, T]` of the recorded steps."""
        return self.distribution(rollout).logprob

    def step_kl(self, rollout: Rollout, other: FlowPolicy, estimator: str = "exact") -> Tensor:
        """KL `[B, T]` of this policy from another at the recorded states."""
        return self.distribution(rollout).kl(other.distribution(rollout), estimator)

    def save(self, path: Path | str) -> None:
        """Write the weights to one safetensors file, whole or not at all."""
        save_tree(Path(path), {"weights": self.state_dict()})

    def load(self, path: Path | str) -> Self:
        """Read weights that `save` wrote into this policy, and return it.

        Raises:
            StorageError: the file cannot be read.
            RuntimeError: the weights are those of another architecture.
        """
        self.load_state_dict(load_tree(Path(path))["weights"])
        return self

    def reference(self) -> FlowPolicy:
        """A frozen policy with the present weights, or these weights with their adapters switched off."""
        if getattr(self.denoiser, "has_adapters", False):
            return _WithoutAdapters(self)
        frozen = copy.deepcopy(self)
        return frozen.requires_grad_(False).eval()

    def extra_repr(self) -> str:
        """Settings, for `repr` and the run's configuration."""
        return f"shape={self.shape}, shift={self.shift}, logprob_reduce={self.logprob_reduce!r}"


class _WithoutAdapters(FlowPolicy):
    """A policy's base weights: the same network with its adapters off."""

    def __init__(self, policy: FlowPolicy) -> None:
        nn.Module.__init__(self)
        # A list keeps the policy out of this module's own parameters.
        self._policy = [policy]
        for name in ("decode", "shape", "shift", "logprob_reduce", "knobs", "version"):
            setattr(self, name, getattr(policy, name))

    @property
    def device(self) -> torch.device:
        return self._policy[0].device

    def condition(self, context: TensorDict) -> TensorDict:
        return self._policy[0].condition(context)

    def velocity(
        self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor | float = 1.0
    ) -> Tensor:
        disabled = getattr(self._policy[0].denoiser, "adapters_disabled", nullcontext)
        with cast(AbstractContextManager[None], disabled()):
            return self._policy[0].velocity(x, sigma, conditioning, guidance)

    def reference(self) -> Self:
        return self
