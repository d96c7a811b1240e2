"""The comparison of returns does without Stable-Baselines3 what it can, and keeps its books right."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def returns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported where there is no Stable-Baselines3."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "benchmarks.returns", raising=False)
    return importlib.import_module("benchmarks.returns")


def run_of(module: Any, settings: Any, side: str) -> Any:
    return module.run(module.Comparison("tiny", settings, episodes=2), side, 0)


def tiny_ppo(module: Any) -> Any:
    return module.PPO("CartPole-v1", 2, 8, 4, 2, 16, 1, 1e-3, True, 0.98, 0.8)


def tiny_sac(module: Any) -> Any:
    return module.SAC("Pendulum-v1", 12, 4, 1e-3, random=2)


def test_our_side_runs_without_stable_baselines3(returns: Any) -> None:
    curve = run_of(returns, tiny_ppo(returns), "ours")
    assert curve.steps == [32, 64]
    assert all(1 <= found <= 500 for found in curve.returns)
    with pytest.raises(ImportError):
        run_of(returns, tiny_ppo(returns), "theirs")


def test_both_sides_are_evaluated_after_the_same_steps(returns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stable_baselines3")
    pytest.importorskip("stable_baselines3")
    for settings in (tiny_ppo(returns), tiny_sac(returns)):
        assert run_of(returns, settings, "ours").steps == run_of(returns, settings, "theirs").steps


def test_an_evaluation_is_of_whole_episodes_that_are_always_the_same(returns: Any) -> None:
    def one(seen: Any) -> Any:
        return np.ones(len(seen), dtype=int)

    found = returns.mean_return("CartPole-v1", one, 4)
    assert found == returns.mean_return("CartPole-v1", one, 4)
    # Pushed to one side only, the pole falls within 8 to 10 steps.
    assert 8 <= found <= 10


def test_actions_out_of_bounds_are_taken_as_the_bound(returns: Any) -> None:
    def push(by: float) -> float:
        return float(returns.mean_return("Pendulum-v1", lambda seen: np.full((len(seen), 1), by, np.float32), 2))

    assert push(7.0) == push(2.0) != push(1.0)


def test_runs_that_are_done_are_not_done_again(returns: Any, tmp_path: Path) -> None:
    path = tmp_path / "returns.json"
    results = returns.Results(path)
    assert len(results.missing(["cartpole"], returns.SIDES, [0, 1])) == 4
    results.add("cartpole", "ours", 1, returns.Curve([1, 2], [3.0, 4.0]))
    again = returns.Results(path)
    assert again.missing(["cartpole"], returns.SIDES, [0, 1]) == [
        ("cartpole", "ours", 0), ("cartpole", "theirs", 0), ("cartpole", "theirs", 1)
    ]  # fmt: skip
    assert list(json.loads(path.read_text())["runs"]) == ["cartpole/ours/1"]


def test_seeds_without_both_sides_are_not_compared(returns: Any) -> None:
    results = returns.Results(None)
    for side, seed in (("ours", 0), ("theirs", 0), ("ours", 1)):
        results.add("cartpole", side, seed, returns.Curve([1], [float(seed)]))
    assert [len(curves) for curves in results.curves("cartpole", [0, 1]).values()] == [1, 1]


def test_the_final_return_is_the_mean_of_the_last_quarter_rounded_up(returns: Any) -> None:
    curve = returns.Curve([1, 2, 3, 4, 5], [9.0, 9.0, 9.0, 1.0, 2.0])
    assert curve.final == 1.5
    assert curve.throughout == 6.0


@pytest.mark.parametrize(("shift", "below"), [(-5.0, True), (0.0, False), (5.0, False)])
def test_below_is_what_no_resampling_of_the_seeds_explains(returns: Any, shift: float, below: bool) -> None:
    noise = [-1.0, 1.0, -0.5, 0.5, 0.0]
    curves = {
        "ours": [returns.Curve([1], [10 + shift + more]) for more in noise],
        "theirs": [returns.Curve([1], [10.0]) for _ in noise],
    }
    verdict = returns.Verdict.of(curves)
    assert verdict.difference.mean == pytest.approx(shift)
    assert verdict.ours.mean - verdict.theirs.mean == pytest.approx(shift)
    assert verdict.below is below


def test_equal_returns_are_not_below(returns: Any) -> None:
    curves = {side: [returns.Curve([1], [500.0]) for _ in range(5)] for side in returns.SIDES}
    assert not returns.Verdict.of(curves).below


def test_weights_start_as_pytorch_starts_them(returns: Any) -> None:
    critic = returns.QNetwork(returns.MLPTorso(4, ()), 5, widths=(100,))
    returns.start_as_pytorch_does(critic)
    first = critic.layers[0]
    for weights in (first.weight, first.bias):
        assert float(weights.detach().abs().max()) <= 1 / 3
        assert float(weights.detach().std()) == pytest.approx(1 / 3 / 3**0.5, rel=0.1)


def test_the_figure_has_a_panel_for_each_task(returns: Any) -> None:
    results = returns.Results(None)
    for side in returns.SIDES:
        for seed in (0, 1):
            results.add("cartpole", side, seed, returns.Curve([10, 20], [1.0 + seed, 2.0]))
    (axes,) = returns.figure(results, ["cartpole"], [0, 1]).axes
    assert [line.get_label() for line in axes.lines] == ["Regimen", "Stable-Baselines3"]
    assert list(axes.lines[0].get_ydata()) == [1.5, 2.0]
