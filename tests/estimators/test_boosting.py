"""R-MTGB: worked numbers, limiting cases, scikit-learn's own checks, storage, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import cross_val_score
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils.estimator_checks import check_estimator

from regimen.cast import Cast
from regimen.estimators import (
    RobustMultiTaskGradientBoostingClassifier,
    RobustMultiTaskGradientBoostingRegressor,
    minority_score,
    theta_gradient,
)
from regimen.estimators.rounds import LogLoss, Parts, Rounds, SquaredLoss
from regimen.estimators.trees import Tree
from regimen.storage import load_tree, save_tree

Regressor = RobustMultiTaskGradientBoostingRegressor
Classifier = RobustMultiTaskGradientBoostingClassifier
KINDS = [Regressor, Classifier]


def data(rows: int = 240, tasks: int = 4) -> tuple[Any, Any, Any]:
    """Related tasks, of which the last is the opposite of the others; rows of tasks are mixed."""
    rng = np.random.default_rng(1)
    x, task = rng.uniform(-1, 1, (rows, 3)), rng.permutation(np.arange(rows) % tasks)
    y = (np.sin(3 * x[:, 0]) + x[:, 1]) * np.where(task == tasks - 1, -1, 1)
    return x, y, task


def small(kind: Any = Regressor, **settings: Any) -> Any:
    return kind(**{"n_shared": 3, "n_partition": 6, "n_task": 3, "random_state": 0, **settings})


def columns(*values: float) -> Any:
    return np.array(values)[:, None]


# Worked numbers


def test_the_step_of_theta_is_the_one_computed_by_hand() -> None:
    y, theta = columns(2, 4, -1), np.array([0.3])
    outlier, other = columns(0.5, 1, -2), columns(0.2, 0.4, 0.6)
    parts = Parts(columns(1, 1, 1), other, outlier, columns(0, 0, 0))
    share = expit(theta)[0]
    outputs = parts.mixed(share)
    np.testing.assert_allclose(outputs, columns(1.372333, 1.744666, 0.106449), atol=1e-6)
    residual = SquaredLoss(y).residual(outputs)
    np.testing.assert_allclose(share * residual, columns(0.360559, 1.295560, -0.635592), atol=1e-6)
    np.testing.assert_allclose((1 - share) * residual, columns(0.267108, 0.959774, -0.470858), atol=1e-6)
    gradient = theta_gradient(theta, residual, outlier, other, np.zeros(3, dtype=np.intp))
    assert gradient[0] == pytest.approx(-1.080083, abs=1e-6)
    assert (theta - 0.1 * gradient)[0] == pytest.approx(0.408008, abs=1e-6)


def test_the_gradient_of_the_log_loss_sums_over_samples_and_outputs() -> None:
    y, outlier, other = np.eye(2), np.eye(2), np.array([[0, 1], [0.5, 0]])
    parts = Parts(np.zeros((2, 2)), other, outlier, np.zeros((2, 2)))
    outputs = parts.mixed(0.5)
    np.testing.assert_allclose(outputs, [[0.5, 0.5], [0.25, 0.5]])
    residual = LogLoss(y).residual(outputs)
    gradient = theta_gradient(np.zeros(1), residual, outlier, other, np.zeros(2, dtype=np.intp))
    assert gradient[0] == pytest.approx(-0.414184, abs=1e-6)


@pytest.mark.parametrize("loss", [SquaredLoss, LogLoss])
def test_the_gradient_of_theta_is_that_of_finite_differences(loss: Any) -> None:
    rng = np.random.default_rng(0)
    task, theta = np.arange(12) % 3, rng.normal(size=3)
    target = np.eye(2)[rng.integers(0, 2, 12)] if loss is LogLoss else rng.normal(size=(12, 1))
    parts = Parts(*(rng.normal(size=target.shape) for _ in range(4)))
    held = loss(target)

    def total(at: Any) -> float:
        return 12 * held.mean(parts.mixed(expit(at)[task][:, None]))

    residual = held.residual(parts.mixed(expit(theta)[task][:, None]))
    found = theta_gradient(theta, residual, parts.outlier, parts.non_outlier, task)
    for index in range(3):
        step = np.eye(3)[index] * 1e-5
        assert found[index] == pytest.approx((total(theta + step) - total(theta - step)) / 2e-5, rel=1e-6)


def test_a_saturated_theta_has_no_gradient() -> None:
    ones = np.ones((2, 1))
    for value in (-60.0, 60.0):
        found = theta_gradient(np.full(2, value), ones, 5 * ones, -ones, np.arange(2))
        np.testing.assert_allclose(found, 0, atol=1e-20)


def test_outliers_are_the_fewer_whichever_side_they_are_on() -> None:
    theta = np.array([2.0, 3.0, -2.0, 1.0])
    np.testing.assert_allclose(minority_score(theta), 1 - expit(theta))
    np.testing.assert_allclose(minority_score(-theta), expit(-theta))
    half = np.array([1.0, -1.0])
    np.testing.assert_allclose(minority_score(half), expit(half))


# Limiting cases


def test_with_shared_rounds_only_it_is_gradient_boosting_of_the_pooled_data() -> None:
    x, y, task = data()
    settings: dict[str, Any] = {"learning_rate": 0.1, "max_depth": 3, "max_leaf_nodes": 8, "random_state": 0}
    ours = Regressor(n_shared=20, n_partition=0, n_task=0, **settings).fit(x, y, task)
    theirs = GradientBoostingRegressor(n_estimators=20, init="zero", criterion="squared_error", **settings).fit(x, y)
    np.testing.assert_allclose(ours.predict(x, task), theirs.predict(x), atol=1e-10)


@pytest.mark.parametrize("bins", [None, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_with_own_rounds_only_it_is_a_booster_per_task(kind: Any, bins: int | None) -> None:
    x, y, task = data()
    x, y = x.round(1), (y if kind is Regressor else (y > 0).astype(int))  # Few values, so that bins are the same.
    together = small(kind, n_shared=0, n_partition=0, n_task=8, bins=bins).fit(x, y, task)
    method = "predict" if kind is Regressor else "predict_proba"
    for index in range(4):
        rows = task == index
        alone = small(kind, n_shared=0, n_partition=0, n_task=8, bins=bins).fit(x[rows], y[rows])
        found = getattr(together, method)(x[rows], task[rows])
        np.testing.assert_allclose(found, getattr(alone, method)(x[rows]), atol=1e-10)


def test_theta_does_not_move_in_the_first_round_of_the_partition() -> None:
    x, y, task = data()
    start = small(n_partition=0).fit(x, y, task).theta_
    assert np.array_equal(small(n_partition=1).fit(x, y, task).theta_, start)
    assert not np.array_equal(small(n_partition=2).fit(x, y, task).theta_, start)


def test_with_equal_trees_on_both_sides_the_partition_is_boosting_at_half_the_rate() -> None:
    x, y, _ = data()

    class Same:
        """At theta = 0 both sides are fitted to half the gradient; here by the same tree."""

        def shared(self, target: Any) -> tuple[Tree, Any]:
            fitted = DecisionTreeRegressor(max_depth=2, random_state=0).fit(x, target).predict(x)
            return None, fitted[:, None]  # type: ignore[return-value]

    nobody = np.zeros(len(x), dtype=np.intp)
    run = Rounds(SquaredLoss(y[:, None]), Same(), nobody, np.zeros(1), Parts.zeros(len(x), 1))  # type: ignore[arg-type]
    expected = np.zeros(len(x))
    for _ in range(5):
        run.partition(0.2, mean=False)
        expected += 0.1 * DecisionTreeRegressor(max_depth=2, random_state=0).fit(x, y - expected).predict(x)
        assert run.theta[0] == 0
    np.testing.assert_allclose(run.outputs[:, 0], expected, atol=1e-10)


@pytest.mark.parametrize("bins", [None, 32])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_training_loss_of_shared_and_own_rounds_does_not_rise(rate: float, bins: int | None) -> None:
    x, y, task = data()
    loss = small(n_shared=10, n_partition=0, n_task=10, learning_rate=rate, bins=bins).fit(x, y, task).train_loss_
    assert len(loss) == 20
    assert (np.diff(loss) <= 1e-12).all()


def test_the_last_training_loss_is_that_of_the_predictions() -> None:
    x, y, task = data()
    for bins in (None, 32):
        model = small(bins=bins).fit(x, y, task)
        assert model.train_loss_[-1] == pytest.approx(np.square(y - model.predict(x, task)).mean() / 2)


# What it learns


@pytest.mark.parametrize("bins", [None, 64])
def test_the_task_that_is_unlike_the_others_is_isolated(bins: int | None) -> None:
    x, y, task = data(400)
    names = np.array(["red", "green", "blue", "odd"])[task]
    model = Regressor(n_shared=10, n_partition=40, n_task=10, bins=bins, random_state=0).fit(x, 2 * y, names)
    odd = model.tasks_ == "odd"
    assert model.outlier_score_[odd].item() > 0.9
    assert model.outlier_score_[~odd].max() < 0.1
    assert model.score(x, 2 * y, task=names) > 0.9


def test_flipped_classes_are_isolated() -> None:
    x, y, task = data(400)
    model = Classifier(n_shared=10, n_partition=60, n_task=5, random_state=0).fit(x, y > 0, task)
    assert model.tasks_[model.outlier_score_ > 0.5].tolist() == [3]
    assert model.score(x, y > 0, task=task) > 0.9
    np.testing.assert_allclose(model.predict_proba(x, task).sum(1), 1)


def test_the_mean_gradient_is_the_sum_over_the_tasks_size() -> None:
    x, y, task = data()
    start = small(n_partition=0).fit(x, y, task).theta_
    by_sum, by_mean = (
        small(n_partition=2, mean_gradient=mean).fit(x, y, task).theta_ - start for mean in (False, True)
    )
    np.testing.assert_allclose(by_mean, by_sum / 60)


def test_other_names_for_the_tasks_change_nothing_but_their_names() -> None:
    x, y, task = data()
    for bins in (None, 32):
        one = small(bins=bins).fit(x, y, task)
        renamed = np.array([7, 3, 9, 1])[task]
        other = small(bins=bins).fit(x, y, renamed)
        assert np.array_equal(one.predict(x, task), other.predict(x, renamed))
        assert np.array_equal(one.theta_, other.theta_)
        assert np.array_equal(np.array([7, 3, 9, 1])[one.tasks_], other.tasks_)


def test_a_seed_decides_everything() -> None:
    x, y, task = data()
    np.random.seed(5)
    one = small().fit(x, y, task)
    np.random.seed(6)
    assert np.array_equal(one.theta_, small().fit(x, y, task).theta_)
    assert not np.array_equal(one.theta_, small(random_state=1).fit(x, y, task).theta_)


def test_some_of_the_tasks_are_predicted_as_among_all() -> None:
    x, y, task = data()
    model = small().fit(x, y, task)
    everything, some = model.predict(x, task), task >= 2
    np.testing.assert_allclose(model.predict(x[some], task[some]), everything[some])


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_task_gets_the_mean_over_tasks_that_are_no_outliers(kind: Any) -> None:
    x, y, task = data()
    model = small(kind, n_partition=40).fit(x, y if kind is Regressor else y > 0, task)
    related = model.tasks_[model.outlier_score_ <= 0.5]
    method = model.predict if kind is Regressor else model.predict_proba
    expected = np.mean([method(x, np.full(len(x), name)) for name in related], axis=0)
    assert 0 < len(related) < 4
    np.testing.assert_allclose(model.predict_related(x), expected)


def test_what_was_fitted_is_counted() -> None:
    x, y, task = data()
    model = small().fit(x, y, task)
    assert model.trees_fitted_ == 3 + 2 * 6 + 4 * 3
    assert model.rows_fitted_ == 240 * (3 + 2 * 6 + 3)


def test_theta_moves_with_the_square_of_the_targets_scale() -> None:
    x, y, task = data()
    start = small(n_partition=0).fit(x, y, task).theta_
    once, twice = (small(n_partition=2).fit(x, factor * y, task).theta_ - start for factor in (1, 2))
    np.testing.assert_allclose(twice, 4 * once)


# In scikit-learn and in a cast


@pytest.mark.parametrize("bins", [None, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_the_checks_of_scikit_learn_without_exception(kind: Any, bins: int | None) -> None:
    model = kind(n_shared=8, n_partition=4, n_task=8, learning_rate=0.3, bins=bins, random_state=0)
    check_estimator(model, on_skip=None)


def test_cross_validation_hands_the_tasks_on(request: pytest.FixtureRequest) -> None:
    import sklearn

    x, y, task = data()
    with sklearn.config_context(enable_metadata_routing=True):
        model = small().set_fit_request(task=True).set_score_request(task=True)
        scores = cross_val_score(model, x, y, params={"task": task}, cv=3)
    assert len(scores) == 3
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("bins", [None, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_estimator_comes_back_from_a_checkpoint(kind: Any, bins: int | None, tmp_path: Path) -> None:
    x, y, task = data()
    names = np.array(["a", "b", "c", "d"])[task]
    target = y if kind is Regressor else np.where(y > 0, "yes", "no")
    cast = Cast(booster=small(kind, bins=bins))
    cast["booster"].fit(x, target, names)
    cast.snapshot("booster", "kept")
    save_tree(tmp_path / "cast.safetensors", cast.state_dict())
    again = Cast(booster=small(kind, bins=bins))
    again.load_state_dict(load_tree(tmp_path / "cast.safetensors"))
    method = "predict" if kind is Regressor else "predict_proba"
    for member in ("booster", "kept"):
        one, other = cast[member], again[member]
        assert np.array_equal(getattr(one, method)(x, names), getattr(other, method)(x, names))
        assert np.array_equal(one.predict_related(x), other.predict_related(x))
        assert np.array_equal(one.outlier_score_, other.outlier_score_)
        assert other.predict(x, names)[0] == one.predict(x, names)[0]


def test_an_estimator_that_was_not_fitted_has_no_state() -> None:
    assert small().state_dict() == {}
    untouched = small()
    untouched.load_state_dict({})
    assert untouched.state_dict() == {}


# Bad input


def test_an_unknown_task_is_an_error_that_names_the_known_ones() -> None:
    x, y, task = data()
    model = small().fit(x, y, task)
    with pytest.raises(ValueError, match=r"task holds 9, which was not there in fit; expected one of .*0.*3"):
        model.predict(x, np.where(task == 1, 9, task))


def test_no_task_is_an_error_where_there_are_several() -> None:
    x, y, task = data()
    with pytest.raises(ValueError, match="task is None, but there are 4 tasks"):
        small().fit(x, y, task).predict(x)
    assert len(small().fit(x, y).predict(x)) == len(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, t: (x, y, t[:-1]), r"task has shape \[239\], expected \[240\]"),
        (lambda x, y, t: (x, y[:-1], t), "inconsistent numbers of samples"),
        (lambda x, y, t: (np.where(x > 0.9, np.nan, x), y, t), "Input X contains NaN"),
        (lambda x, y, t: (x, np.where(y > 0.9, np.nan, y), t), "Input y contains NaN"),
        (lambda x, y, t: (x, y, np.where(t == 1, np.nan, t)), "task holds NaN for 60 samples"),
        (lambda x, y, t: (x, y, np.array(["a", 1, *t[2:]], dtype=object)), "texts beside other labels"),
    ],
)
def test_bad_data_is_an_error(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().fit(*change(*data()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_shared": -1}, "expected none below 0"),
        ({"n_shared": 0, "n_partition": 0, "n_task": 0}, "at least one in all"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected above 0"),
        ({"max_leaf_nodes": 1}, "max_leaf_nodes is 1; expected at least 2"),
        ({"bins": 1}, "bins is 1; expected at least 2"),
    ],
)
def test_settings_out_of_range_are_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**setting).fit(*data())


def test_a_fitted_estimator_can_be_copied_and_fitted_again() -> None:
    x, y, task = data()
    model = small().fit(x, y, task)
    before = copy.deepcopy(model).predict(x, task)
    assert np.array_equal(model.fit(x, y, task).predict(x, task), before)
