"""Things that go wrong in the middle of a run: what the user is told, and that a resume ends as if nothing had."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Epochs, Event, Regimen, RunError, Stage, StorageError, Update, train
from regimen.controllers import Piecewise, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective
from regimen.objectives.base import Batch
from regimen.policies import FlowPolicy
from regimen.rewards import Reward, Scene, judge, reward_from
from regimen.rollout import Rollout
from regimen.runs import RunFolder, read_metrics, save_image_sheet
from regimen.tasks import DatasetTask, Evaluation, PromptTask

SHAPE, STEPS = (1, 2, 2), 6
Spoil = Callable[[Tensor], Any]


class Judge(Reward):
    """Brightness; at some askings (counted from 1) something is done to it. Its settings do not tell."""

    name = "bright"

    def __init__(self, spoil: Spoil | None = None, at: int = 5) -> None:
        self._spoil, self._at, self._asked = spoil, at, itertools.count(1)

    def score(self, rollout: Rollout, scene: Scene) -> Any:
        value = rollout["image"].flatten(1).mean(1)
        return self._spoil(value) if self._spoil is not None and next(self._asked) >= self._at else value


class Surrogate(ClippedSurrogateObjective):
    """The clipped surrogate; from some asking on it is NaN."""

    asked, bad = itertools.count(1), math.inf

    def loss(self, batch: Batch) -> Any:
        value, metrics = super().loss(batch)
        return (value * torch.nan if next(self.asked) >= self.bad else value), metrics


def policy(width: int = 32, blocks: int = 1) -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(MLPDenoiser(SHAPE, 2, width=width, blocks=blocks), SHAPE, sampling_steps=3, evaluation_steps=4)


def brightness(policy: FlowPolicy, knobs: Any, rng: torch.Generator) -> Evaluation:
    contexts = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    return Evaluation({"brightness": float(policy.sample(contexts, knobs, rng)["image"].mean())})


def build(reward: Reward | None = None, member: FlowPolicy | None = None, **settings: Any) -> Regimen:
    rows = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    options: dict[str, Any] = {
        "reward": reward or Judge(),
        "credit": GroupRelativeAdvantage(),
        "updates": [Update(ClippedSurrogateObjective(clip=0.01), batches=Epochs(1, 2))],
        "max_failed_share": 0.1,
        **settings,
    }
    task = PromptTask("prompts", rows, group_size=4, evaluate=brightness)
    return Regimen(Cast(policy=member or policy()), [Stage("reinforce", [task], STEPS, 16, **options)])


def run(out: Path, regimen: Regimen, resume: bool = False, **options: Any) -> list[Event]:
    """Train with a checkpoint every second iteration."""
    told: list[Event] = []
    train(regimen, out=out, resume=resume, checkpoint_every=2, listener=told.append, **options)
    return told


def records(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What an untroubled run logs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, build())
    return records(out)


# Rewards


def fail(value: Tensor) -> Tensor:
    raise ConnectionError("the judge is away")


def hang(value: Tensor) -> Tensor:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fail, "reward 'bright' raised ConnectionError: the judge is away"),
        (hang, "reward 'bright' did not return within 0.3 s"),
        (lambda value: value * torch.nan, "reward 'bright' returned nan for sample 0 (task prompts)"),
        (lambda value: value / 0, "reward 'bright' returned "),
        (lambda value: value[None].expand(3, -1), "returned shape [3, 16], expected [16] (one per sample)"),
        (lambda value: "very bright", "reward 'bright' returned 'very bright', expected a tensor"),
    ],
)
def test_a_judge_that_breaks_down_stops_the_run_and_once_it_is_mended_the_run_goes_on(
    tmp_path: Path, whole: list[dict[str, Any]], spoil: Spoil, message: str
) -> None:
    with pytest.raises(RunError) as error:
        run(tmp_path, build(Judge(spoil), reward_timeout_s=0.3))
    assert "16 of the last 80 samples could not be judged, over the share of 0.1" in str(error.value)
    assert message in str(error.value)
    assert "the run continues from its last checkpoint" in str(error.value)
    run(tmp_path, build(reward_timeout_s=0.3), resume=True)
    assert records(tmp_path) == whole


def test_components_that_are_finite_and_together_are_not_are_a_failure() -> None:
    huge = [reward_from(lambda rollout: torch.full((len(rollout),), 3e38)) for _ in range(2)]
    huge[0].name, huge[1].name = "one", "two"
    rollout = Rollout.create(task="t", group=torch.arange(4) // 2, mask=torch.ones(4, 1, dtype=torch.bool))
    reward = huge[0] + huge[1]
    judged, report = judge(reward, rollout, Scene(knobs={"weight/one": 1.0, "weight/two": 1.0}))
    assert report.failed == 4
    assert report.errors == ("the total of sample 0 is inf: its components are finite, together they are not",)
    assert judged.reward.tolist() == [0, 0, 0, 0]
    assert not judged.loss_mask.any()


# Losses


def test_losses_that_are_not_finite_are_skipped_and_counted_and_once_mended_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def regimen() -> Regimen:
        return build(updates=[Update(Surrogate(clip=0.01), batches=Epochs(1, 2))], max_skipped=3)

    monkeypatch.setattr(Surrogate, "asked", itertools.count(1))
    monkeypatch.setattr(Surrogate, "bad", 5)
    with pytest.raises(RunError, match="4 gradient steps in a row were not finite at iteration 4; the weights are"):
        run(tmp_path, regimen())
    steps = [record for record in records(tmp_path) if record["kind"] == "step"]
    assert [record["skipped"] for record in steps] == [0, 0, 2, 4]
    assert [record["gradient_steps"] for record in steps] == [2, 4, 4, 4]
    monkeypatch.setattr(Surrogate, "bad", math.inf)
    run(tmp_path, regimen(), resume=True)
    steps = [record for record in records(tmp_path) if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["gradient_steps"] for record in steps] == [2, 4, 6, 8, 10, 12]
    assert steps[-1]["skipped"] == 0  # The bad iterations came after the checkpoint, and were not bad again.


def test_data_that_turns_bad_while_it_is_read_never_reaches_the_weights(tmp_path: Path) -> None:
    drawn = itertools.count(1)

    def spoil(rows: TensorDict, rng: torch.Generator) -> TensorDict:
        return rows.set("image", rows["image"] * (torch.nan if next(drawn) > 3 else 1.0))

    rows = TensorDict({"image": torch.zeros(4, *SHAPE), "context": {"condition": torch.arange(4) % 2}}, batch_size=[4])
    task = DatasetTask("pairs", rows, transform=spoil)
    stage = Stage("fit", [task], STEPS, 8, updates=[Update(FlowMatchingObjective())], max_skipped=2)
    member = policy()
    with pytest.raises(RunError, match="2 gradient steps in a row were not finite at iteration 5.*look for NaN in the"):
        run(tmp_path, Regimen(Cast(policy=member), [stage]))
    assert all(bool(value.isfinite().all()) for value in member.state_dict().values())
    warned = [record["skipped"] for record in records(tmp_path) if record["kind"] == "step"]
    assert warned == [0, 0, 0, 1, 2]


# Knobs


def test_a_noise_level_that_falls_to_zero_is_told_with_its_remedy(tmp_path: Path) -> None:
    level = [Schedule("noise_level", Piecewise([(0, 0.7), (3, 0.0)]))]
    with pytest.raises(ValueError, match=r"needs 'logprobs'.*noise_level > 0"):
        run(tmp_path, build(controllers=level))
    assert [record["step"] for record in records(tmp_path) if record["kind"] == "step"] == [1, 2, 3]


def test_a_value_out_of_range_names_who_gave_it() -> None:
    falling = [Schedule("noise_level", Piecewise([(0, 0.7), (2, -0.1)]))]
    with pytest.raises(ValueError, match=r"knob 'noise_level': Schedule gave -0.1, expected a finite number in \[0.0"):
        train(build(controllers=falling))


def test_a_knob_of_two_controllers_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    both = [Schedule("noise_level", Piecewise([(0, value)])) for value in (0.5, 0.7)]
    with pytest.raises(ValueError, match="knob 'noise_level' is moved by two controllers: controller Schedule"):
        run(tmp_path / "run", build(controllers=both))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", "a/b", "two\nlines", "\x1b[31m"])
def test_names_that_cannot_name_files_and_metrics_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names files and metrics; expected printable characters without '/'"):
        Regimen(Cast(policy=policy()), [Stage(name, build().stages[0].tasks, 1)])
    with pytest.raises(ValueError, match="expected printable characters without '/'"):
        Stage("stage", [PromptTask(name, TensorDict({"condition": torch.arange(2)}, batch_size=[2]))], 1)


# Checkpoints


def interrupt(out: Path) -> list[Path]:
    """A run that ends after five of six iterations; its checkpoints, the newest first."""
    with pytest.raises(RunError):
        run(out, build(Judge(fail)))
    return sorted((out / "checkpoints").iterdir(), reverse=True)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("broken", [1, 2])
def test_a_truncated_checkpoint_is_passed_over_and_the_user_is_told(
    tmp_path: Path, whole: list[dict[str, Any]], broken: int
) -> None:
    newest = interrupt(tmp_path)
    for path in newest[:broken]:
        halve(path)
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        told = run(tmp_path, build(), resume=True)
    texts = [event.text for event in told if event.kind == "warning"]
    assert [str(warning.message) for warning in warned] == texts
    for text, path in zip(texts, newest[:broken], strict=True):
        assert text.startswith(f"{path} cannot be read")
        assert "truncated" in text
        assert text.endswith("falling back to the checkpoint before, or to the start if there is none")
    assert records(tmp_path) == whole


def test_a_checkpoint_whose_metrics_are_lost_is_passed_over(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    interrupt(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:4]))  # As after a power failure.
    with pytest.warns(UserWarning, match="goes with .* bytes of metrics, and .* are left"):
        run(tmp_path, build(), resume=True)
    assert records(tmp_path) == whole


def test_another_architecture_is_refused_and_the_run_is_left_as_it_was(
    tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    interrupt(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    for member in (policy(width=16), policy(blocks=2)):
        with pytest.raises(RunError, match="holds a run with other settings: /cast/policy/parameters was .* and is"):
            run(tmp_path, build(member=member), resume=True)
    assert {path: path.read_bytes() for path in before} == before
    run(tmp_path, build(), resume=True)
    assert records(tmp_path) == whole


def test_weights_of_another_shape_and_equal_number_are_refused_by_name(tmp_path: Path) -> None:
    class Square(torch.nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(rows, columns))

    def regimen(member: Square) -> Regimen:
        return Regimen(Cast(policy=policy(), head=member), build().stages)

    run(tmp_path, regimen(Square(2, 6)))
    with pytest.raises(ValueError, match=r"'weight' of member 'head' is \[2, 6\] in the file and \[3, 4\] here; build"):
        run(tmp_path, regimen(Square(3, 4)), resume=True)


def test_settings_that_cannot_be_read_are_an_error_of_their_own(tmp_path: Path) -> None:
    interrupt(tmp_path)
    halve(tmp_path / "config.json")
    with pytest.raises(RunError, match=r"config.json cannot be read \(.*\), so the run cannot go on; choose another"):
        run(tmp_path, build(), resume=True)


# Disks


def test_a_disk_that_is_full_when_a_checkpoint_is_due_loses_nothing_before_it(
    tmp_path: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.checkpoint

    def full(self: RunFolder, state: Any, number: int) -> None:
        with monkeypatch.context() as patch:
            if number == 4:
                patch.setattr("regimen.storage.os.fsync", refuse)
            save(self, state, number)

    def refuse(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "checkpoint", full)
        with pytest.raises(StorageError, match="No space left on device; free some room"):
            run(tmp_path, build())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002.safetensors"]
    run(tmp_path, build(), resume=True)
    assert records(tmp_path) == whole


def test_a_picture_that_finds_no_room_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "sheet.png").write_text("old")
    monkeypatch.setattr("regimen.storage.os.fsync", refuse)
    with pytest.raises(StorageError, match="sheet.png cannot be written: .*No space left on device"):
        save_image_sheet(tmp_path / "sheet.png", torch.zeros(1, *SHAPE))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_text() == "old"
