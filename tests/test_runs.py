"""Run folders: what they refuse, what they survive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from regimen import RunError, StorageError
from regimen.runs import RunFolder, describe, read_metrics, save_image_sheet
from regimen.storage import load_tree, random_state, replacing, save_tree, set_random_state


def test_tree_survives_a_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tree = {
        "a": shared,
        "same": shared,
        "transposed": shared.T,
        "nested": [1, 2.5, None, True, "text", (1, shared)],
        "keys": {0: "zero", 1: torch.tensor(3)},
        "empty": {},
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    back = load_tree(tmp_path / "tree.safetensors")
    assert torch.equal(back["a"], shared)
    assert torch.equal(back["transposed"], shared.T)
    assert back["nested"][:5] == tree["nested"][:5]  # type: ignore[index]
    assert isinstance(back["nested"][5], tuple)
    assert back["keys"][0] == "zero"
    assert int(back["keys"][1]) == 3
    assert back["empty"] == {}


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    weight = torch.zeros(100_000)
    save_tree(tmp_path / "one", {"a": weight})
    save_tree(tmp_path / "two", {"a": weight, "b": weight})
    assert (tmp_path / "two").stat().st_size < 1.1 * (tmp_path / "one").stat().st_size


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(TypeError, match=r"state at '/part/object' is a object"):
        save_tree(Path("unused"), {"part": {"object": object()}})


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_file_is_refused_by_name(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"a": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(StorageError, match=r"tree.safetensors cannot be read"):
        load_tree(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match="cannot be written"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_while_logging_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run", {}, resume=False)

    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="No space left on device; free some room and resume"):
        folder.log({"kind": "step", "metrics": {}}, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_noticed_at_the_record_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    folder = RunFolder(tmp_path, {}, resume=False)
    with pytest.raises(StorageError, match="No space left on device; free some room and resume"):
        folder.log({"kind": "step", "metrics": {"x": 1.0}}, 1)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_what_is_logged_can_be_read_at_once_by_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    for step in (1, 2):
        folder.log({"kind": "step", "metrics": {"a/x": 0.5 * step, "y": float("nan")}}, step)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step
        shown = curves(tmp_path)
        assert shown["step/a/x"] == [(s, 0.5 * s) for s in range(1, step + 1)]
        assert [s for s, _ in shown["step/y"]] == list(range(1, step + 1))


def test_resumed_run_shows_its_own_curves_from_the_checkpoint_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    for step in range(1, 5):
        folder.log({"kind": "step", "metrics": {"x": float(step)}}, step)
        if step == 2:
            folder.checkpoint({}, step)
    resumed = RunFolder(tmp_path, {}, resume=True)
    resumed.restore()
    for step in (3, 4, 5):
        resumed.log({"kind": "step", "metrics": {"x": 10.0 * step}}, step)
    assert curves(tmp_path)["step/x"] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]


def test_lines_follow_when_a_run_at_work_is_cut_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    for step in (1, 2, 3):
        folder.log({"kind": "step", "step": step, "metrics": {}}, step)
        if step == 1:
            folder.checkpoint({}, step)
    folder.restore()
    folder.log({"kind": "step", "step": 4, "metrics": {}}, 4)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]


def test_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"seed": 1}, resume=False).log({"kind": "step", "metrics": {"x": 1.0}}, 1)
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder(tmp_path, {"seed": 1}, resume=False)


def test_resume_with_other_settings_names_the_difference(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"stages": [{"steps": 5}]}, resume=False)
    with pytest.raises(RunError, match=r"/stages\[0\]/steps was 5 and is 6"):
        RunFolder(tmp_path, {"stages": [{"steps": 6}]}, resume=True)


def test_folder_under_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", {}, resume=False)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    folder.log({"kind": "step", "metrics": {"x": 1.0}}, 1)
    folder.checkpoint({"value": 1}, 1)
    folder.log({"kind": "step", "metrics": {"x": 2.0}}, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    state = RunFolder(tmp_path, {}, resume=True).restore()
    assert state is not None
    assert state["value"] == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_only_the_last_checkpoints_are_kept_and_a_broken_one_is_skipped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    for number in range(5):
        folder.checkpoint({"value": number}, number)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in files] == ["00000003.safetensors", "00000004.safetensors"]
    files[1].write_bytes(files[1].read_bytes()[:20])
    with pytest.warns(UserWarning, match="falling back to the checkpoint before"):
        state = folder.restore()
    assert state is not None
    assert state["value"] == 3


def test_random_states_are_restored() -> None:
    import random

    import numpy as np

    state = random_state()
    first = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    set_random_state(state)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == first


def test_describe_reaches_every_setting() -> None:
    from regimen.credit import GroupRelativeAdvantage
    from regimen.objectives import ClippedSurrogateObjective

    described = describe({"credit": GroupRelativeAdvantage(clip=5), "objective": 0.5 * ClippedSurrogateObjective()})
    assert described["credit"]["clip"] == 5
    assert "0.5" in str(described["objective"])
    assert describe(str.split) == "builtins.str.split"


@pytest.mark.parametrize("channels", [1, 3])
def test_image_sheet(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    save_image_sheet(tmp_path / "sheet.png", torch.zeros(5, channels, 4, 4), columns=3, scale=2)
    assert Image.open(tmp_path / "sheet.png").size == (3 * 5 * 2, 2 * 5 * 2)
