"""R-MTGB: the smoke test, what arms differ in, the data, the claims, and one's own table."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regimen import papers, train
from regimen.checkers import check
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.papers.r_mtgb import METHODS, PAPER, Settings, boosted, booster, errors, rounds, tables
from regimen.tasks.worlds.related_tables import digit_tables, fourier_tables, random_fourier, table_of

QUICK = PAPER.scales["quick"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of scale quick, all of it."""
    out = tmp_path_factory.mktemp("r-mtgb") / "quick"
    return run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick")) and read_results(out)


def final(method: Any, s: Settings, seed: int = 0) -> dict[str, float]:
    return dict(train(boosted(method, seed, s), seed=seed).evaluations[-1]["metrics"])


# The smoke test


def test_every_arm_is_fitted_and_every_claim_computed(quick: dict[str, Any]) -> None:
    assert quick["failures"] == []
    assert list(quick["arms"]) == list(METHODS)
    assert quick["left_out"] == []
    assert all(claim["missing"] == {} for claim in quick["claims"])


def test_arms_read_the_same_rows_and_tell_what_they_fitted(quick: dict[str, Any]) -> None:
    own = {name: seeds["0"]["final"] for name, seeds in quick["arms"].items()}
    assert {seeds["0"]["rows"] for seeds in quick["arms"].values()} == {400}
    assert {name: found["test/trees"] for name, found in own.items()} == {
        "r_mtgb": 10 + 40 + 80, "mtb": 25 + 100, "mtb_rows": 30 + 160, "feature": 50, "single": 200, "pooled": 50,
    }  # fmt: skip
    assert {name: found["test/tree_rows"] / 400 for name, found in own.items()} == {
        "r_mtgb": 70, "mtb": 50, "mtb_rows": 70, "feature": 50, "single": 50, "pooled": 50,
    }  # fmt: skip
    assert [name for name in own if "test/isolated" in own[name]] == ["r_mtgb"]


# Arms and settings


def test_arms_differ_in_rounds_alone() -> None:
    s = Settings()
    totals = {method: sum(rounds(method, s)) for method in METHODS}
    assert totals == {**dict.fromkeys(METHODS, 150), "mtb_rows": 210}
    first = booster("r_mtgb", 3, s).get_params()
    for method in METHODS:
        changed = {name for name, value in booster(method, 3, s).get_params().items() if value != first[name]}
        assert changed <= {"n_shared", "n_partition", "n_task"}
    assert (first["n_shared"], first["n_partition"], first["n_task"]) == (30, 60, 60)
    assert (first["learning_rate"], first["max_depth"], first["max_leaf_nodes"], first["bins"]) == (0.1, 3, 8, None)


def test_the_estimator_is_not_told_which_tasks_are_outliers() -> None:
    regimen = boosted("r_mtgb", 0, QUICK)
    assert all(set(task.rows.keys()) == {"x", "y", "task"} for task in regimen.stages[0].tasks)  # type: ignore[attr-defined]
    assert [task.name for task in regimen.stages[0].tasks] == ["task0", "task1", "task2", "task3"]


@pytest.mark.parametrize("method", ["r_mtgb", "feature"])
def test_a_regimen_without_a_policy_passes_the_checks(method: Any) -> None:
    assert check(boosted(method, 0, QUICK)).messages == []


def test_errors_are_means_over_tasks_and_the_outliers_apart() -> None:
    s = dataclasses.replace(QUICK, tasks=3, outliers=1)
    regimen, data = boosted("r_mtgb", 1, s), tables(1, s)
    cast = train(regimen, seed=1).cast
    found = errors(cast, data.test, data.names, data.outliers)
    each = {}
    for index, name in enumerate(data.names):
        rows = data.test[data.test["task"] == index]
        wrong = cast["booster"].predict(rows["x"].numpy(), np.full(len(rows), name)) - rows["y"].numpy()
        each[name] = float(np.sqrt(np.mean(wrong**2)))
    assert found["error"] == pytest.approx(np.mean(list(each.values())))
    assert found["error_outliers"] == pytest.approx(each[data.outliers[0]])
    scores = dict(zip(cast["booster"].tasks_.tolist(), cast["booster"].outlier_score_, strict=True))
    isolated = {name for name, score in scores.items() if score > 0.5} == set(data.outliers)
    assert found["isolated"] == float(isolated)


def test_the_same_seed_gives_the_same_numbers_with_and_without_bins() -> None:
    for bins in (None, 64):
        s = dataclasses.replace(QUICK, bins=bins)
        assert final("r_mtgb", s) == final("r_mtgb", s)
        assert final("r_mtgb", s) != final("r_mtgb", s, seed=1)


# The data


def test_related_functions_are_alike_and_outliers_are_alike_among_themselves() -> None:
    data = fourier_tables(tasks=6, outliers=2, dim=2, train=4, test=600, seed=0)
    odd = [name in data.outliers for name in data.names]
    assert sum(odd) == 2
    fits = {name: data.test[data.test["task"] == index] for index, name in enumerate(data.names)}
    # Neighbours in x: what two tasks say of nearly the same place.
    correlation = torch.empty(6, 6)
    for i, one in enumerate(fits.values()):
        for j, other in enumerate(fits.values()):
            nearest = torch.cdist(one["x"], other["x"]).argmin(1) if i != j else torch.arange(600)
            correlation[i, j] = torch.corrcoef(torch.stack([one["y"], other["y"][nearest]]))[0, 1]
    same = torch.tensor(odd)[:, None] == torch.tensor(odd)[None]
    assert correlation[same].min() > 0.8
    assert correlation[~same].abs().max() < 0.7


def test_a_random_function_has_variance_one_over_draws() -> None:
    rng = np.random.default_rng(0)
    values = [random_fourier(rng, 5)(np.zeros((1, 5)))[0] for _ in range(400)]
    assert np.var(values) == pytest.approx(1, abs=0.25)


def test_other_seeds_make_other_tasks_the_outliers() -> None:
    assert len({fourier_tables(5, 1, 2, 2, 2, seed).outliers for seed in range(12)}) > 2
    with pytest.raises(ValueError, match="4 outliers of 4 tasks; expected fewer"):
        fourier_tables(4, 4, 2, 2, 2, 0)


def test_digits_are_shared_out_once_and_outliers_are_turned_around() -> None:
    data = digit_tables(10, 2, 0.67, seed=0)
    plain = digit_tables(10, 0, 0.67, seed=0)
    assert sum(len(rows) for rows in data.train.values()) + len(data.test) == 1797
    assert data.train["task0"]["x"].shape[1] == 64
    everything = torch.cat([*(rows["x"] for rows in data.train.values()), data.test["x"]])
    assert len(everything.unique(dim=0)) == 1797
    assert 0.4 < data.test["y"].mean() < 0.6
    assert len(plain.outliers) == 0
    assert len(data.outliers) == 2


def test_the_task_as_a_feature_is_one_hot() -> None:
    data = fourier_tables(3, 1, 2, 4, 4, 0).with_task_as_feature()
    assert data.train["task1"]["x"].shape == (4, 5)
    assert data.train["task1"]["x"][:, 2:].tolist() == [[0, 1, 0]] * 4


# Real data


def write_table(path: Path, classes: bool = False) -> Path:
    """A small table of schools, one of which is unlike the others."""
    rng = np.random.default_rng(0)
    lines = ["hours,gender,school,score"]
    for row in range(120):
        hours, school = rng.uniform(0, 1), row % 3
        score = (1 - 2 * (school == 2)) * hours + rng.normal() * 0.01
        lines.append(f"{hours},{'fm'[row % 2]},s{school},{int(score > 0.5) if classes else score}")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("classes", [False, True])
def test_the_full_scale_runs_on_a_table_of_ones_own(classes: bool, tmp_path: Path) -> None:
    table = str(write_table(tmp_path / "schools.csv", classes))
    changes: dict[str, Any] = {"table": table, "target": "score", "task": "school", "classes": classes}
    s = dataclasses.replace(PAPER.scales["full"], **changes, shared=5, partition=10, own=10)
    found = {method: final(method, s) for method in METHODS}
    assert all("test/isolated" not in each for each in found.values())
    assert all(found[method]["test/error"] < 0.35 for method in ("r_mtgb", "mtb", "mtb_rows", "feature", "single"))


def test_a_table_has_one_hot_categories_and_its_tasks_as_names(tmp_path: Path) -> None:
    data = table_of(write_table(tmp_path / "t.csv"), "score", "school", 0.5, seed=0)
    assert data.names == ("s0", "s1", "s2")
    assert data.train["s0"]["x"].shape == (20, 3)
    assert data.test["x"].shape == (60, 3)
    assert data.test["x"][:, 1:].sum(1).tolist() == [1.0] * 60


def test_a_table_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="has no column rating; it has: hours, gender, school, score"):
        table_of(path, "rating", "school", 0.5, 0)
    path.write_text(path.read_text() + "\n,f,s0,1")
    with pytest.raises(ValueError, match="1 missing values"):
        table_of(path, "score", "school", 0.5, 0)
    path.write_text("x,school,score\n1,a,1\n2,a,1\n3,b,1")
    with pytest.raises(ValueError, match="task 'b' has 1 row; expected at least 2"):
        table_of(path, "score", "school", 0.5, 0)


def test_digits_run_as_classes() -> None:
    s = dataclasses.replace(PAPER.scales["digits"], shared=3, partition=3, own=3)
    assert 0 < final("r_mtgb", s)["test/error"] < 0.5
