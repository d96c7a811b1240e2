"""The weight between imitation and reinforcement: worked numbers, limits, and a controller that leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.controllers import MetaGradientWeight, Probe, Situation, TargetEntropy, meta_gradient, mixed_weight_step

SFT, RL, VAL = (torch.tensor(point, dtype=torch.float64) for point in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.5)))
ALPHA, MU = 0.1, 0.8


def quadratic(theta: Tensor, centre: Tensor) -> Tensor:
    return 0.5 * (theta - centre).square().sum()


def ahead(mu: float, theta: Tensor | None = None) -> Tensor:
    """The parameters after the inner step."""
    theta = torch.zeros(2, dtype=torch.float64) if theta is None else theta
    return theta - ALPHA * (mu * (theta - SFT) + (1 - mu) * (theta - RL))


def gain(mu: float) -> float:
    return -float(quadratic(ahead(mu), VAL))


class Quadratics:
    """An insight into two quadratic losses at a point."""

    def __init__(self, entropy: float = 0.5) -> None:
        self.theta, self.entropy, self.probes = torch.zeros(2, dtype=torch.float64), entropy, 0

    def losses(self, *names: str) -> dict[str, float]:
        return dict.fromkeys(names, self.entropy)

    def gradients(self, *names: str) -> dict[str, Tensor]:
        return {"sft": self.theta - SFT, "surrogate+entropy": self.theta - RL}

    def probe(self) -> Any:
        self.probes += 1

    def probe_gradient(self, rollout: Any) -> Tensor:
        return self.theta - VAL

    @contextmanager
    def moved(self, by: Tensor) -> Iterator[None]:
        before, self.theta = self.theta, self.theta + by
        yield
        self.theta = before


def controller(**changes: Any) -> MetaGradientWeight:
    probe = Probe(SimpleNamespace(name="probe", group_size=1, knobs=()), 64, objective=SimpleNamespace(knobs=()))
    settings = {"meta_lr": 0.1, "entropy_lr": 0.2, "inner_lr": ALPHA, "target_entropy": 0.5, **changes}
    return MetaGradientWeight("sft_weight", probe, **settings)


def act(
    weight: MetaGradientWeight, insight: Any = None, mu: float = MU, step: int = 0
) -> tuple[float, dict[str, float]]:
    situation = Situation(step, None, {}, {"sft_weight": mu}, Quadratics() if insight is None else insight)
    return float(weight(situation)["sft_weight"]), situation.notes


# The formulas


def test_the_meta_gradient_is_the_slope_of_the_held_out_gain() -> None:
    theta = ahead(MU)
    assert theta.tolist() == pytest.approx([0.08, 0.02])
    sft, rl = -SFT, -RL
    found = meta_gradient(theta - VAL, sft, rl, ALPHA, "none")
    assert found == pytest.approx(0.044, abs=1e-12)
    assert (gain(MU + 1e-4) - gain(MU - 1e-4)) / 2e-4 == pytest.approx(found, abs=1e-9)
    assert [gain(mu) for mu in (0.7, 0.8, 0.9)] == pytest.approx([-0.5429, -0.5384, -0.5341])
    assert meta_gradient(-VAL, sft, rl, ALPHA, "none") == pytest.approx(0.05)


def test_the_cosine_is_normalised_by_both_gradients() -> None:
    assert meta_gradient(ahead(MU) - VAL, -SFT, -RL) == pytest.approx(0.299827, abs=1e-6)
    assert meta_gradient(-VAL, -SFT, -RL) == pytest.approx(0.316228, abs=1e-6)
    assert meta_gradient(-1e6 * VAL, -SFT, -RL, lr=7.0) == pytest.approx(0.316228, abs=1e-6)
    v = torch.tensor([3.0, 4.0])
    assert meta_gradient(v, v, 0 * v) == pytest.approx(1.0)


def test_equal_gradients_give_no_meta_gradient() -> None:
    v = torch.tensor([1.0, 2.0])
    for normalize in ("cosine", "none"):
        assert meta_gradient(-v, v, v, 1.0, normalize) == 0.0


def test_worked_steps_of_the_weight() -> None:
    def step(mu: float, mg: float, entropy: float) -> float:
        return mixed_weight_step(mu, mg, entropy, 0.5, meta_lr=0.1, entropy_lr=0.2)

    assert step(0.8, 0.5, 0.3) == pytest.approx(0.89)
    assert step(0.8, -0.5, 1.5) == pytest.approx(0.55)
    assert step(0.94, 1.0, 0.0) == 0.95
    assert step(0.1, -1.0, 1.0) == 0.05
    assert step(0.8, 0.0, 0.5) == 0.8


def test_formulas_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shapes \[2\], \[3\], \[2\]; expected one shape"):
        meta_gradient(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="normalize 'l2' is not one of cosine, none"):
        meta_gradient(torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0, "l2")  # type: ignore[arg-type]


# The controller


def test_it_passes_the_checks_of_a_users_controller() -> None:
    assert check(controller(), knobs={"sft_weight": 0.8}).messages == []


def test_the_look_ahead_probes_where_the_inner_step_leads() -> None:
    assert act(controller(normalize="none", lookahead=True))[1]["meta_gradient"] == pytest.approx(0.044)
    assert act(controller(normalize="none"))[1]["meta_gradient"] == pytest.approx(0.05)
    mu, notes = act(controller(lookahead=True))
    assert mu == pytest.approx(0.8 + 0.1 * 0.299827, abs=1e-6)
    assert notes["meta_move"] == pytest.approx(0.0299827, abs=1e-6)


def test_between_meta_gradients_only_the_entropy_acts() -> None:
    insight, weight = Quadratics(entropy=0.3), controller(every=10)
    moved = [act(weight, insight, step=step)[0] for step in range(20)]
    assert insight.probes == 2
    assert moved[1] == pytest.approx(0.8 + 0.2 * 0.2)
    assert moved[0] == moved[10] == pytest.approx(0.8 + 0.0316228 + 0.04, abs=1e-6)


def test_the_weight_rises_where_entropy_is_below_its_target_and_falls_above() -> None:
    weight = controller(meta_lr=0.0)
    assert act(weight, Quadratics(0.3))[0] > MU > act(weight, Quadratics(0.9))[0]
    assert act(weight, Quadratics(0.5))[0] == MU


def test_without_rates_the_weight_stays_and_nothing_is_asked() -> None:
    weight = MetaGradientWeight("sft_weight", None, meta_lr=0, entropy_lr=0)
    assert act(weight, object())[0] == MU
    assert weight.needs.probe is None


def test_numbers_that_are_not_finite_leave_the_weight_alone() -> None:
    insight = Quadratics()
    insight.theta = torch.tensor([math.nan, 0.0])
    assert act(controller(), insight) == (MU, {"mu_skipped": 1.0})
    assert act(controller(), Quadratics(math.inf)) == (MU, {"mu_skipped": 1.0})
    assert act(controller())[1]["mu_skipped"] == 0.0


def test_the_target_is_part_of_the_state() -> None:
    weight = controller(target_entropy=None)
    with pytest.raises(RuntimeError, match="target entropy not set"):
        act(weight)
    weight.load_state_dict(controller(target_entropy=0.7).state_dict())
    assert weight.target_entropy == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 0.6, "high": 0.5}, "expected 0 <= low <= high <= 1"),
        ({"every": 0}, "every=0"),
        ({"meta_lr": -1.0}, "rates of at least 0"),
        ({"normalize": "sign"}, "expected cosine or none"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller(**changes)


def test_a_start_outside_the_bounds_and_a_missing_probe_are_errors() -> None:
    with pytest.raises(ValueError, match=r"'sft_weight' is 0\.97, expected within \[0\.05, 0\.95\]"):
        act(controller(), mu=0.97)
    with pytest.raises(ValueError, match="the held-out loss is missing"):
        MetaGradientWeight("sft_weight", None)


def test_the_target_is_the_mean_entropy_of_what_is_learned_from() -> None:
    class Uniform(torch.nn.Linear):
        def distribution(self, rollout: Any, where: Tensor) -> Any:
            return SimpleNamespace(entropy=lambda: torch.where(where, math.log(7), 0.0))

    class Task:
        name, place = "demonstrations", 3

        def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Any:
            self.place += size
            return SimpleNamespace(loss_mask=torch.rand(size, 5, generator=rng) < 0.5)

        def state_dict(self) -> dict[str, int]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.place = state["place"]

    weight, task = controller(target_entropy=None), Task()
    TargetEntropy(weight, batches=2, size=4)({"policy": Uniform(1, 1)}, [task], None)
    assert weight.target_entropy == pytest.approx(math.log(7))
    assert task.place == 3
    with pytest.raises(ValueError, match="no task 'demonstrations'"):
        TargetEntropy(weight)({"policy": Uniform(1, 1)}, [], None)
