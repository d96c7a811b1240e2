"""Flow policies: worked numbers through the policy, the ratio before an update, references, guidance, storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.checkers import assert_ok
from regimen.functions import shifted_sigmas
from regimen.knobs import Knobs
from regimen.models import MLPDenoiser
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.storage import StorageError

SHAPE = (1, 2, 2)
TRAINING = {"sampling_steps": 4.0, "noise_level": 0.7, "guidance": 1.0}
Sampled = Callable[..., tuple[FlowPolicy, Rollout]]
Contexts = Callable[[int], TensorDict]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unprompted(count: int) -> TensorDict:
    return TensorDict({"condition": torch.zeros(count, dtype=torch.int64)}, batch_size=[count])


class Constant(nn.Module):
    """The same velocity everywhere; another one without the prompt."""

    def __init__(self, *velocity: float, null: float = 0.0) -> None:
        super().__init__()
        self.velocity, self.null = nn.Parameter(torch.tensor(velocity)), null

    def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        plain = self.velocity.expand(x.shape)
        return torch.full_like(x, self.null) if "is_null" in context else plain

    def unconditional(self, context: Any) -> Any:
        return {**context, "is_null": torch.ones(len(context), dtype=torch.bool)}


class ExactVelocity(nn.Module):
    """Velocity of the flow to N(1 + condition, .5^2) from N(0, 1), in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        t = sigma[:, None]
        k = (t - 0.25 * (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2)
        mean = self.mean * (1 + context["condition"][:, None])
        return k * (x - (1 - t) * mean) - mean

    def unconditional(self, context: Any) -> Any:
        return {"condition": torch.ones_like(context["condition"])}


def one_step(sigmas: tuple[float, ...], after: Tensor, level: float = 0.7, guidance: float = 1.0) -> Rollout:
    """The worked example: one sample at (.5, -1) whose first step led to `after`."""
    return Rollout.create(
        task="policy", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 1, dtype=torch.bool),
        observations=torch.tensor([[[0.5, -1.0]]]), actions=after.view(1, 1, 2),
        columns={"sigmas": torch.tensor([sigmas])}, knobs={"noise_level": level, "guidance": guidance},
    )  # fmt: skip


AFTER = torch.tensor([0.316330, -0.755720])


@pytest.mark.parametrize(("reduce", "logprob", "moved", "ratio"), [
    ("mean", -0.483192, -0.484401, 0.998792), ("sum", -0.966384, -0.968802, 0.997585),
])  # fmt: skip
def test_worked_step_through_the_policy(reduce: Any, logprob: float, moved: float, ratio: float) -> None:
    policy = FlowPolicy(Constant(1.0, -0.5), (2,), logprob_reduce=reduce)
    steps = policy.distribution(one_step((0.8, 0.6), AFTER))
    torch.testing.assert_close(steps.mean, torch.tensor([[0.1285, -0.6305]]))
    assert float(steps.std) == pytest.approx(0.626099, abs=1e-6)
    other = FlowPolicy(Constant(1.02, -0.5), (2,), logprob_reduce=reduce)
    after = other.distribution(one_step((0.8, 0.6), AFTER))
    torch.testing.assert_close(after.mean, torch.tensor([[0.12352, -0.6305]]))
    assert float(steps.logprob.detach()) == pytest.approx(logprob, abs=3e-6)
    assert float(after.logprob.detach()) == pytest.approx(moved, abs=3e-6)
    assert float((after.logprob - steps.logprob).exp().detach()) == pytest.approx(ratio, abs=3e-6)


def test_worked_first_step_through_the_policy() -> None:
    policy = FlowPolicy(Constant(1.0, -0.5), (2,))
    after = torch.tensor([0.2775, -0.705]) + 0.7 * torch.tensor([0.3, -0.2])
    steps = policy.distribution(one_step((1.0, 0.9, 0.75), after))
    torch.testing.assert_close(steps.mean, torch.tensor([[0.2775, -0.705]]))
    assert float(steps.std) == pytest.approx(0.7, abs=1e-6)
    assert float(steps.logprob.detach()) == pytest.approx(-0.594764, abs=2e-6)


@pytest.mark.parametrize(("estimator", "expected"), [("exact", 1.58166e-5), ("flow_grpo", 3.16332e-6)])
@pytest.mark.parametrize(("reduce", "dimensions"), [("mean", 1), ("sum", 2)])
def test_worked_divergence(estimator: str, expected: float, reduce: Any, dimensions: int) -> None:
    policy, reference = (FlowPolicy(Constant(v, -0.5), (2,), logprob_reduce=reduce) for v in (1.02, 1.0))
    divergence = policy.step_kl(one_step((0.8, 0.6), AFTER), reference, estimator)
    assert float(divergence.detach()) == pytest.approx(dimensions * expected, rel=1e-4)


def test_divergence_in_the_form_of_velocities(sampled: Sampled, tiny_policy: Callable[..., FlowPolicy]) -> None:
    """KL = |dt| / 2 (s (1 - t) / (2 t) + 1 / s)^2 (v - v')^2 for t below 1."""
    policy, rollout = sampled()
    other = tiny_policy(seed=5)
    sigmas, level = rollout["sigmas"][0], 0.7
    found = policy.step_kl(rollout, other).detach()
    for i in range(1, rollout.steps):
        t, x = sigmas[i], rollout.observations[:, i]
        s = level * (t / (1 - t)).sqrt()
        velocities = [p.velocity(x, t.expand(len(x)), rollout.context).detach() for p in (policy, other)]
        gap = (velocities[0] - velocities[1]).square().flatten(1).mean(1)
        expected = (t - sigmas[i + 1]) / 2 * (s * (1 - t) / (2 * t) + 1 / s).square() * gap
        torch.testing.assert_close(found[:, i], expected, rtol=1e-3, atol=1e-7)


def test_sum_is_the_mean_times_the_dimensions(sampled: Sampled, tiny_policy: Callable[..., FlowPolicy]) -> None:
    (mean, rollout), (total, again) = sampled(logprob_reduce="mean"), sampled(logprob_reduce="sum")
    assert torch.equal(rollout.actions, again.actions)
    torch.testing.assert_close(4 * rollout.logprobs, again.logprobs)
    torch.testing.assert_close(4 * mean.logprob(rollout), total.logprob(rollout))
    torch.testing.assert_close(
        4 * mean.distribution(rollout).entropy(), total.distribution(rollout).entropy(), rtol=1e-5, atol=1e-5
    )
    other = tiny_policy(seed=3)
    torch.testing.assert_close(4 * mean.step_kl(rollout, other), total.step_kl(rollout, other))


def test_entropy_is_the_gaussians(sampled: Sampled) -> None:
    policy, rollout = sampled(logprob_reduce="sum")
    steps = policy.distribution(rollout)
    expected = torch.distributions.Normal(steps.mean, steps.std[:, None, None, None]).entropy().sum((1, 2, 3))
    torch.testing.assert_close(steps.entropy().flatten(), expected.detach())


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("level", [0.1, 0.7, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize(("reduce", "shift"), [("mean", 1.0), ("sum", 3.0)])
def test_ratio_is_exactly_one_before_an_update(
    sampled: Sampled, contexts: Contexts, guidance: float, level: float, steps: int, reduce: Any, shift: float
) -> None:
    knobs = {"guidance": guidance, "noise_level": level, "sampling_steps": steps}
    # A network may round differently for another number of rows.
    policy, rollout = sampled(64, knobs, logprob_reduce=reduce, shift=shift)
    assert rollout.steps == steps
    ratio = (policy.logprob(rollout) - rollout.logprobs).exp()
    torch.testing.assert_close(ratio, torch.ones(64, steps), atol=5e-6, rtol=0)
    # Without matrix products there is nothing to excuse.
    policy = FlowPolicy(ExactVelocity(), (3,), logprob_reduce=reduce, shift=shift)
    rollout = policy.sample(contexts(64), knobs, seeded())
    assert torch.equal(policy.logprob(rollout), rollout.logprobs)


def test_rollouts_of_different_knobs_are_scored_as_they_were_sampled(
    tiny_policy: Callable[..., FlowPolicy], contexts: Contexts
) -> None:
    policy = tiny_policy()
    parts = [
        policy.sample(contexts(4), {**TRAINING, "guidance": guidance, "noise_level": level}, seeded())
        for guidance, level in ((1.0, 0.7), (4.5, 0.3))
    ]
    joined = Rollout.cat(parts)
    torch.testing.assert_close(policy.logprob(joined), joined.logprobs, atol=1e-5, rtol=0)


def test_another_guidance_is_another_policy(sampled: Sampled) -> None:
    policy, rollout = sampled(knobs={"guidance": 4.5})
    knobs = {"noise_level": rollout.knobs["noise_level"], "guidance": torch.ones(len(rollout))}
    wrong = policy.logprob(rollout.replace(knobs=knobs))
    assert float((wrong - rollout.logprobs).abs().max().detach()) > 1e-3


def test_guidance_is_linear_and_its_null_branch_carries_no_gradient() -> None:
    denoiser = Constant(1.0, -0.5, null=0.25)
    policy = FlowPolicy(denoiser, (2,))
    x, sigma = torch.zeros(1, 2), torch.ones(1)
    guided = policy.velocity(x, sigma, {}, 4.5)
    torch.testing.assert_close(guided, torch.tensor([[0.25 + 4.5 * 0.75, 0.25 - 4.5 * 0.75]]))
    torch.testing.assert_close(policy.velocity(x, sigma, {}, 0.0), torch.tensor([[0.25, 0.25]]))
    per_row = policy.velocity(x.expand(2, 2), sigma.expand(2), {}, torch.tensor([1.0, 4.5]))
    torch.testing.assert_close(per_row, torch.cat([policy.velocity(x, sigma, {}), guided]))


def test_gradient_of_the_null_condition_is_zero(sampled: Sampled) -> None:
    policy, rollout = sampled(knobs={"guidance": 4.5})
    policy.logprob(rollout).sum().backward()
    gradient = policy.denoiser.condition.weight.grad
    assert gradient[2].abs().sum() == 0
    assert (gradient[:2].abs().sum(1) > 0).all()


def test_gradient_of_the_logprob_against_finite_differences(sampled: Sampled) -> None:
    policy, rollout = sampled(logprob_reduce="sum")
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(policy.logprob(rollout).sum(), parameters)
    directions = [torch.randn(p.shape, generator=seeded(3)) for p in parameters]

    def moved(size: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += size * direction
            value = float(policy.logprob(rollout).double().sum())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= size * direction
        return value

    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(expected, rel=2e-2)


def test_some_steps_only(sampled: Sampled) -> None:
    policy, rollout = sampled()
    where = torch.zeros_like(rollout.mask)
    where[1::2, 1:3] = True
    some, whole = policy.distribution(rollout, where), policy.distribution(rollout)
    torch.testing.assert_close(some.logprob, torch.where(where, whole.logprob, 0))
    torch.testing.assert_close(some.entropy(), torch.where(where, whole.entropy(), 0))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_no_steps_at_all_are_zeros(sampled: Sampled, reduce: str) -> None:
    policy, rollout = sampled(logprob_reduce=reduce)
    none = policy.distribution(rollout, torch.zeros_like(rollout.mask))
    for value in (none.logprob, none.entropy(), none.kl(none)):
        assert torch.equal(value, torch.zeros(rollout.mask.shape))


def test_what_a_rollout_holds(sampled: Sampled) -> None:
    policy, rollout = sampled(shift=3.0)
    torch.testing.assert_close(rollout["sigmas"], torch.tensor([[1, 0.9, 0.75, 0.5, 0]]).expand(8, 5))
    assert torch.equal(rollout.observations[:, 1:], rollout.actions[:, :-1])
    assert torch.equal(rollout["image"], rollout.actions[:, -1])
    assert rollout.loss_mask.tolist() == [[True, True, True, False]] * 8
    assert rollout.knobs["guidance"].tolist() == [1.0] * 8
    assert (rollout.version == policy.version).all()
    assert not rollout.logprobs.requires_grad


def test_a_single_step_is_learned_from(sampled: Sampled) -> None:
    _, rollout = sampled(knobs={"sampling_steps": 1})
    assert rollout.loss_mask.all()


def test_evaluation_is_the_ode(tiny_policy: Callable[..., FlowPolicy], contexts: Contexts) -> None:
    policy = tiny_policy(shift=3.0)
    rollout = policy.sample(contexts(4), Knobs.of(policy).for_evaluation(), seeded())
    assert rollout.steps == 8
    assert rollout.logprobs is None
    x, sigmas = rollout.observations[:, 0], shifted_sigmas(8, 3.0)
    for now, after in pairwise(sigmas):
        x = x + (after - now) * policy.velocity(x, now.expand(4), contexts(4)).detach()
    torch.testing.assert_close(rollout["image"], x, atol=1e-5, rtol=0)


def test_same_generator_same_sample(tiny_policy: Callable[..., FlowPolicy], contexts: Contexts) -> None:
    policy = tiny_policy()
    images = [policy.sample(contexts(4), TRAINING, seeded(seed))["image"] for seed in (1, 1, 2)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_decoder_makes_the_image(sampled: Sampled) -> None:
    _, rollout = sampled(decode=lambda latents: latents.flatten(1).sum(1))
    torch.testing.assert_close(rollout["image"], rollout.actions[:, -1].flatten(1).sum(1))


def test_conditioner_is_asked_once_and_trained_with_the_policy(contexts: Contexts) -> None:
    calls: list[int] = []

    class Connector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, context: TensorDict) -> dict[str, Tensor]:
            calls.append(len(context))
            return {"shift": self.shift.expand(len(context), 2)}

    class Shifted(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, context: TensorDict) -> Tensor:
            return x + context["shift"]

    policy = FlowPolicy(Shifted(), (2,), conditioner=Connector())
    rollout = policy.sample(contexts(6), TRAINING, seeded())
    ratio = (policy.logprob(rollout) - rollout.logprobs).exp()
    assert calls == [6, 6]
    assert torch.equal(ratio, torch.ones(6, 4))
    ratio.sum().backward()
    assert policy.conditioner.shift.grad.abs().sum() > 0


def test_no_reference_image_is_the_same_as_none(tiny_policy: Callable[..., FlowPolicy], contexts: Contexts) -> None:
    policy, plain = tiny_policy(), contexts(4)
    none = TensorDict({"condition": plain["condition"], "reference": None}, batch_size=[4])
    images = [policy.sample(c, {**TRAINING, "guidance": 4.5}, seeded())["image"] for c in (plain, none)]
    assert torch.equal(images[0], images[1])


def test_reference_image_of_another_size_names_both(tiny_policy: Callable[..., FlowPolicy], contexts: Contexts) -> None:
    wrong = contexts(4).set("reference", torch.zeros(4, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(4, 1, 4, 4\).*\(4, 1, 2, 2\)"):
        tiny_policy().sample(wrong, TRAINING, seeded())


@pytest.mark.parametrize(("shift", "steps", "sde", "ode"), [
    (1.0, 200, 0.501028, 0.496309), (1.0, 10, 0.479544, 0.430783),
    (3.0, 200, 0.496595, 0.492748), (3.0, 10, 0.424358, 0.369692),
])  # fmt: skip
def test_marginals_of_the_sampler(shift: float, steps: int, sde: float, ode: float) -> None:
    """Its steps are affine in the state: the mean at 0 and at 1 and the deviation give both moments exactly."""
    policy = FlowPolicy(ExactVelocity(), (1,), shift=shift)
    knobs = {"sampling_steps": float(steps), "noise_level": 0.7, "guidance": 1.0}
    rollout = policy.sample(unprompted(2), knobs, seeded())
    states = torch.tensor([0.0, 1.0])[:, None, None].expand(2, steps, 1)
    noisy = policy.distribution(rollout.replace(observations=states))
    (zero, one), std = noisy.mean.view(2, steps).detach().double(), noisy.std.view(2, steps)[0].double()
    mean, variance = 0.0, 1.0
    for offset, end, deviation in zip(zero.tolist(), one.tolist(), std.tolist(), strict=True):
        slope = end - offset
        mean, variance = offset + slope * mean, slope**2 * variance + deviation**2
    assert math.sqrt(variance) == pytest.approx(sde, abs=5e-6)
    drawn = policy.sample(unprompted(2), {**knobs, "noise_level": 0.0}, seeded())
    start, end = drawn.observations[:, 0, 0].double(), drawn["image"][:, 0].double()
    slope = float((end[1] - end[0]) / (start[1] - start[0]))
    assert slope == pytest.approx(ode, abs=5e-6)
    if shift == 1.0:
        assert mean == pytest.approx(1.0, abs=1e-5)
        assert float(end[0] - slope * start[0]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("level", "std"), [(0.7, 0.479544), (0.0, 0.430783)])
def test_marginals_by_sampling(level: float, std: float) -> None:
    policy, count = FlowPolicy(ExactVelocity(), (1,)), 40_000
    knobs = {"sampling_steps": 10.0, "noise_level": level, "guidance": 1.0}
    image = policy.sample(unprompted(count), knobs, seeded())["image"]
    assert float(image.mean()) == pytest.approx(1.0, abs=4 * std / math.sqrt(count))
    assert float(image.std()) == pytest.approx(std, abs=4 * 0.35 / math.sqrt(count))


def test_reference_is_frozen_and_equal(sampled: Sampled) -> None:
    policy, rollout = sampled()
    policy.train()
    reference = policy.reference()
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training
    assert torch.equal(policy.step_kl(rollout, reference), torch.zeros(8, 4))
    with torch.no_grad():
        policy.denoiser.out.bias += 0.1
    assert (policy.step_kl(rollout, reference) > 0).all()
    torch.testing.assert_close(reference.logprob(rollout), rollout.logprobs)


class Adapted(nn.Module):
    """A frozen denoiser with an adapter that can be switched off, as LoRA is."""

    has_adapters = True

    def __init__(self, base: MLPDenoiser) -> None:
        super().__init__()
        self.base, self.on = base.requires_grad_(False), True
        self.adapter = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        velocity: Tensor = self.base(x, sigma, context)
        return velocity + self.adapter if self.on else velocity

    def unconditional(self, context: Any) -> Any:
        return self.base.unconditional(context)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


@pytest.fixture
def adapted(tiny_policy: Callable[..., FlowPolicy]) -> FlowPolicy:
    return FlowPolicy(Adapted(tiny_policy().denoiser), SHAPE, sampling_steps=4)


def test_reference_under_adapters_is_the_base(adapted: FlowPolicy, tiny_policy: Any, contexts: Contexts) -> None:
    reference, base = adapted.reference(), tiny_policy()
    assert list(reference.parameters()) == []
    assert reference.reference() is reference
    rollout = adapted.sample(contexts(8), TRAINING, seeded())
    assert torch.equal(adapted.step_kl(rollout, reference), torch.zeros(8, 4))
    with torch.no_grad():
        adapted.denoiser.adapter += 0.3
    assert torch.equal(reference.logprob(rollout), base.logprob(rollout))
    assert torch.equal(
        reference.sample(contexts(8), TRAINING, seeded())["image"],
        base.sample(contexts(8), TRAINING, seeded())["image"],
    )
    guided = {**TRAINING, "guidance": 4.5}
    rollout = adapted.sample(contexts(8), guided, seeded())
    torch.testing.assert_close(reference.logprob(rollout), base.logprob(rollout))
    assert (adapted.step_kl(rollout, reference) > 0).all()


def test_adapters_are_on_again_and_keep_their_gradient(adapted: FlowPolicy, contexts: Contexts) -> None:
    rollout = adapted.sample(contexts(8), TRAINING, seeded())
    with torch.no_grad():
        adapted.denoiser.adapter += 0.3
    adapted.step_kl(rollout, adapted.reference()).sum().backward()
    assert adapted.denoiser.on
    assert (adapted.denoiser.adapter.grad > 0).all()
    assert all(p.grad is None for p in adapted.denoiser.base.parameters())


def test_reference_under_adapters_is_made_again_on_resume(adapted: FlowPolicy, tiny_policy: Any) -> None:
    cast = Cast(policy=adapted)
    cast.adopt("reference", adapted.reference(), of="policy")
    assert cast.trainable(["policy"]) == [adapted.denoiser.adapter]
    again = Cast(policy=FlowPolicy(Adapted(tiny_policy(seed=9).denoiser), SHAPE))
    again.load_state_dict(cast.state_dict())
    assert list(again["reference"].parameters()) == []
    assert torch.equal(again["policy"].denoiser.base.out.weight, adapted.denoiser.base.out.weight)


def test_save_and_load(sampled: Sampled, tiny_policy: Callable[..., FlowPolicy], tmp_path: Path) -> None:
    policy, rollout = sampled()
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    other = tiny_policy(seed=4)
    assert not torch.equal(other.logprob(rollout), policy.logprob(rollout))
    assert other.load(path) is other
    assert torch.equal(other.logprob(rollout), policy.logprob(rollout))
    with pytest.raises(RuntimeError, match="denoiser"):
        FlowPolicy(MLPDenoiser(SHAPE, 3, width=8), SHAPE).load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StorageError, match="truncated"):
        other.load(path)


@pytest.mark.parametrize("options", [{}, {"guidance": 4.5, "logprob_reduce": "sum", "shift": 3.0}])
def test_passes_the_checker_for_policies(tiny_policy: Callable[..., FlowPolicy], options: dict[str, Any]) -> None:
    assert_ok(tiny_policy(**options))


def test_repr_tells_the_settings(tiny_policy: Callable[..., FlowPolicy]) -> None:
    assert "shape=(1, 2, 2), shift=3.0, logprob_reduce='mean'" in repr(tiny_policy(shift=3.0))


def test_bad_inputs_are_named(sampled: Sampled, tiny_policy: Callable[..., FlowPolicy], contexts: Contexts) -> None:
    policy, rollout = sampled()
    with pytest.raises(ValueError, match=r"noise_level = 0 \(the ODE\).*set noise_level > 0"):
        policy.logprob(policy.sample(contexts(4), {**TRAINING, "noise_level": 0.0}, seeded()))
    with pytest.raises(ValueError, match="noise_level is -0.1, expected >= 0"):
        policy.sample(contexts(4), {**TRAINING, "noise_level": -0.1}, seeded())
    with pytest.raises(ValueError, match="knob 'noise_level'.*gave -0.1"):
        tiny_policy(noise_level=-0.1)
    with pytest.raises(ValueError, match=r"holds no states \(observations\); sample it first"):
        policy.logprob(Rollout(rollout.data.exclude("observations"), rollout.task_names))
    with pytest.raises(ValueError, match="sigmas must decrease"):
        policy.logprob(rollout.with_columns(sigmas=rollout["sigmas"].flip(1)))
    with pytest.raises(ValueError, match="'k3' is not known to a flow policy; expected exact or flow_grpo"):
        policy.step_kl(rollout, policy, "k3")
