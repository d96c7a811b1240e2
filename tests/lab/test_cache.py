"""Kept starts: trained once per configuration, charged all the same, whole or not there."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

from regimen.lab import cache
from regimen.lab.cache import CacheEntry, cache_folder, content_key
from regimen.lab.display import Display
from regimen.lab.experiment import Arm
from regimen.lab.runner import Plan, Progress, run_experiment
from regimen.storage import StorageError


def run(out: Path, kept: Path, **options: Any) -> tuple[dict[str, Any], list[Progress]]:
    told: list[Progress] = []
    options = {"seeds": [0], "workers": 1, "arms": ["target"], **options}
    return run_experiment(Plan(tiny.load_cached, out, cache=kept, **options), told.append), told


def entries(kept: Path) -> list[Path]:
    return sorted(kept.iterdir()) if kept.exists() else []


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("seconds", "own", "cached")}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A run folder, the cache that it filled, and its results."""
    out, kept = tmp_path_factory.mktemp("first") / "run", tmp_path_factory.mktemp("kept")
    return out, kept, run(out, kept)[0]


@pytest.fixture
def filled(first: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    import shutil

    return Path(shutil.copytree(first[1], tmp_path / "kept"))


def test_a_kept_start_is_not_trained_again_and_gives_the_same_numbers(first: Any, filled: Path, tmp_path: Path) -> None:
    results, told = run(tmp_path / "again", filled)
    assert [p.note.kind for p in told if p.arm == "start" and p.note is not None] == ["begin"]
    assert [p.text.startswith("kept from an earlier run") for p in told if p.kind == "done"] == [True, False]
    assert results["arms"]["start"]["0"]["cached"]
    assert not first[2]["arms"]["start"]["0"]["cached"]
    for arm in ("start", "target"):
        assert untimed(results["arms"][arm]["0"]) == untimed(first[2]["arms"][arm]["0"])


def test_what_a_kept_start_cost_is_charged_as_if_it_had_been_trained(first: Any, filled: Path, tmp_path: Path) -> None:
    before, now = first[2]["arms"], run(tmp_path / "again", filled)[0]["arms"]
    assert now["start"]["0"]["own"] == before["start"]["0"]["own"]
    target = now["target"]["0"]
    assert target["gradient_steps"] == 36
    assert target["seconds"] == pytest.approx(target["own"]["seconds"] + before["start"]["0"]["own"]["seconds"])


def test_the_run_folder_of_a_kept_start_is_complete(first: Any, filled: Path, tmp_path: Path) -> None:
    run(tmp_path / "again", filled)
    ours, theirs = tmp_path / "again" / "start" / "seed0", first[0] / "start" / "seed0"

    def files(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in ("output.txt", "result.json")
        }

    assert files(ours) == files(theirs)
    assert {"config.json", "metrics.jsonl", "cast-warm-up.safetensors"} <= files(ours).keys()


def test_only_what_a_start_depends_on_makes_it_another(filled: Path, tmp_path: Path) -> None:
    counter = tmp_path / "deaths"
    counter.write_text("xxx")
    _, told = run(tmp_path / "ignored", filled, overrides={"killed": str(counter)})
    assert any(p.text.startswith("kept") for p in told)
    for name, change in (
        ("setting", {"overrides": {"rate": "0.1"}}),
        ("knob", {"overrides": {"emphasis": "2"}}),
        ("seed", {"seeds": [1]}),
        ("scale", {"scale": "quick"}),
    ):
        before = len(entries(filled))
        _, told = run(tmp_path / name, filled, arms=["start"], **change)
        assert not any(p.text.startswith("kept") for p in told), name
        assert len(entries(filled)) == before + 1, name


def test_the_key_covers_source_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    key = content_key(tiny.start, {"seed": 0})
    assert key == content_key(tiny.start, {"seed": 0})
    assert key == content_key(partial(tiny.start, s=tiny.Settings()), {"seed": 0})
    assert key != content_key(run, {"seed": 0})
    monkeypatch.setattr(cache, "_package_digest", lambda: "another source")
    changed = content_key(tiny.start, {"seed": 0})
    monkeypatch.setattr(cache.metadata, "version", lambda name: "0")
    assert len({key, changed, content_key(tiny.start, {"seed": 0})}) == 3


@pytest.mark.parametrize("damage", ["flip", "lose", "manifest"])
def test_a_damaged_entry_is_trained_again_with_a_warning(damage: str, first: Any, filled: Path, tmp_path: Path) -> None:
    (entry,) = entries(filled)
    weights = entry / "cast-warm-up.safetensors"
    if damage == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    elif damage == "lose":
        weights.unlink()
    else:
        (entry / cache.MANIFEST).write_text("{}")
    results, told = run(tmp_path / "again", filled)
    warnings = [p.note.text for p in told if p.note is not None and p.note.kind == "warning"]
    assert len(warnings) == 1
    assert f"the start kept in {entry} cannot be used" in warnings[0]
    assert warnings[0].endswith("it is trained again")
    assert not results["arms"]["start"]["0"]["cached"]
    assert untimed(results["arms"]["target"]["0"]) == untimed(first[2]["arms"]["target"]["0"])
    assert CacheEntry(entry).recall(tmp_path / "mended") is not None


def test_a_cache_that_cannot_be_written_is_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    results, told = run(tmp_path / "run", tmp_path / "file" / "kept", scale="quick")
    warnings = [p.note.text for p in told if p.note is not None and p.note.kind == "warning"]
    assert len(warnings) == 1
    assert "cannot be kept" in warnings[0]
    assert results["failures"] == []


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "weights").write_text(text)
    return path


def test_what_was_kept_first_stays(tmp_path: Path) -> None:
    entry = CacheEntry(tmp_path / "kept" / "a")
    entry.keep(folder_of(tmp_path / "one", "one"), {"by": 1})
    entry.keep(folder_of(tmp_path / "two", "two"), {"by": 2})
    assert entry.recall(tmp_path / "back") == {"by": 1}
    assert (tmp_path / "back" / "weights").read_text() == "one"
    assert [path.name for path in entries(tmp_path / "kept")] == ["a"]


def keep_many(path: Path, folder: Path) -> None:
    for _ in range(20):
        CacheEntry(path).keep(folder, {})
        CacheEntry(path).drop()
    CacheEntry(path).keep(folder, {})


def test_processes_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", "one" * 10_000)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=keep_many, args=(tmp_path / "kept" / "a", folder)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert CacheEntry(tmp_path / "kept" / "a").recall(tmp_path / "back") == {}
    assert [path.name for path in entries(tmp_path / "kept")] == ["a"]


def test_a_kill_while_keeping_leaves_no_entry_and_its_rest_is_swept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, folder = CacheEntry(tmp_path / "kept" / "a"), folder_of(tmp_path / "one", "one")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_text", killed)
        patch.setattr(cache.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            entry.keep(folder, {})
    assert entry.recall(tmp_path / "back") is None
    (rest,) = entries(tmp_path / "kept")
    day_ago = time.time() - 25 * 3600
    os.utime(rest, (day_ago, day_ago))
    entry.keep(folder, {})
    assert entries(tmp_path / "kept") == [entry.path]


def test_an_arm_that_learned_nothing_is_not_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", tmp_path / "kept", overrides={"steps": "0"}, arms=["start"])
    assert entries(tmp_path / "kept") == []


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGIMEN_CACHE", str(tmp_path))
    assert cache_folder() == Plan(tiny.load, tmp_path / "run").cache == tmp_path
    monkeypatch.delenv("REGIMEN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "regimen"


def test_the_display_says_where_a_start_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    display = Display(Console(width=200))
    display(Progress("done", "start", 3, text="kept from an earlier run, which took 58 s", finished=1, jobs=2))
    assert "1/2 done start seed 3, kept from an earlier run, which took 58 s: " in capsys.readouterr().out


def test_only_an_arm_without_a_start_is_cached() -> None:
    with pytest.raises(ValueError, match="expected a cached arm to have no start"):
        Arm("a", "a", tiny.target, start="start", cached=True)
    with pytest.raises(ValueError, match="`ignores` of a cached arm only"):
        Arm("a", "a", tiny.target, ignores=["rate"])
    arms = [dataclasses.replace(tiny.PAPER.arms[0], cached=True, ignores=["raet"]), *tiny.PAPER.arms[1:]]
    with pytest.raises(ValueError, match="arm 'start' ignores settings that there are not: raet"):
        dataclasses.replace(tiny.PAPER, arms=arms)


def test_an_entry_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match=r"start kept in .*/a cannot be used .*manifest\.json"):
        CacheEntry(tmp_path / "a").recall(tmp_path / "back")
