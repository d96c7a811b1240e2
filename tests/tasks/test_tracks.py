"""Tracks: made-up walkers, the reader of recordings, and the measure of forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.models import DestinationNetwork, TrackTransformer, TrajectoryNetwork
from regimen.policies import TrajectoryForecaster
from regimen.tasks.worlds import tracks
from regimen.tasks.worlds.tracks import (
    AREA,
    EXTRA,
    FOLDS,
    MARGIN,
    TracksWorld,
    centred,
    eth_ucy,
    pedestrians,
    read_tracks,
)


def written(path: Path, walkers: dict[int, range], step: int = 10, between: str = "\t") -> Path:
    """A recording of walkers who go on by (1, 0.5) in every frame; each is there in a range of frames."""
    frames = sorted({frame for there in walkers.values() for frame in there})
    lines = [
        between.join(map(str, (float(frame * step), float(walker), walker + frame, frame / 2)))
        for frame in frames
        for walker, there in walkers.items()
        if frame in there
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_policy() -> TrajectoryForecaster:
    torch.manual_seed(0)
    first, second = (TrackTransformer(8, 2, 1) for _ in range(2))
    return TrajectoryForecaster(DestinationNetwork(first, 3, hidden=(8,)), TrajectoryNetwork(second, hidden=(8,)))


# Recordings


@pytest.mark.parametrize("between", ["\t", "  "])
def test_every_stretch_of_twenty_positions_is_a_track(tmp_path: Path, between: str) -> None:
    path = written(tmp_path / "a.txt", {1: range(22), 2: range(3, 23), 3: range(19)}, between=between)
    found = read_tracks(path)
    assert found.shape == (4, 20, 2)
    assert found[0, 0].tolist() == [1, 0]
    assert found[2, -1].tolist() == [1 + 21, 10.5]
    assert found[3, 0].tolist() == [2 + 3, 1.5]
    assert read_tracks(path, stride=2)[:, 0, 0].tolist() == [1, 3, 5]
    assert read_tracks(path, past=3, future=2).shape == (18 + 16 + 15, 5, 2)


def test_a_gap_ends_a_track(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = written(path, {1: range(45)}).read_text().splitlines()
    path.write_text("\n".join(lines[:22] + lines[23:]))
    found = read_tracks(path)
    assert found[:, 0, 0].tolist() == [1, 2, 3, 24, 25, 26]
    assert ((found[:, 1:] - found[:, :-1]) == torch.tensor([1.0, 0.5])).all()


def test_frames_may_be_numbered_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", {1: range(20)}, step=6)
    assert len(read_tracks(path, frame_step=6)) == 1
    with pytest.raises(
        ValueError, match=r"a\.txt: nobody is seen for 20 positions .the|give the recording's own frame"
    ):
        read_tracks(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("30.0\t1.0\tnan\t2.0", r"a\.txt, line 4: '30.0\t1.0\tnan\t2.0'; expected 'frame person x y', finite numbers"),
        ("30.0\t1.0\t2.0", r"a\.txt, line 4: .*expected 'frame person x y'"),
        ("30.0 1.0 east 2.0", r"a\.txt, line 4: .*finite numbers"),
        ("10.0\t5.0\t1.0\t2.0", r"a\.txt, line 4: frame 10 comes after frame 20; sort the lines by frame"),
        ("20.0\t1.0\t1.0\t2.0", r"a\.txt, line 4: person 1 is there twice in frame 20; drop one"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "a.txt", {1: range(3)})
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=message):
        read_tracks(path)


def test_tracks_that_are_too_short_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", {1: range(19), 2: range(5)})
    with pytest.raises(
        ValueError, match=r"a\.txt: nobody is seen for 20 positions without a gap .the longest is 19, o"
    ):
        read_tracks(path)
    with pytest.raises(ValueError, match="read_tracks: past=0, future=12, stride=1"):
        read_tracks(path, past=0)
    path.write_text("\n")
    with pytest.raises(ValueError, match="the longest is 0"):
        read_tracks(path)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """One walker in each recording, longer from one to the next, so that tracks tell where they are from."""
    names = [name for names in FOLDS.values() for name in names]
    for number, name in enumerate([*names, *EXTRA]):
        written(tmp_path / f"{name}.txt", {1: range(20 + number)})
    return tmp_path


def test_each_fold_is_tested_on_its_recordings_and_trained_on_the_others(recordings: Path) -> None:
    sizes = {fold: (len(world.train), len(world.test)) for fold in FOLDS for world in [eth_ucy(recordings, fold)]}
    assert sizes == {"eth": (35, 1), "hotel": (34, 2), "univ": (29, 7), "zara1": (31, 5), "zara2": (30, 6)}
    assert not eth_ucy(recordings, "eth").train[:, 7].any()


def test_absent_recordings_are_named(recordings: Path) -> None:
    (recordings / "biwi_eth.txt").unlink()
    (recordings / "uni_examples.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks biwi_eth.txt, uni_examples.txt; .*--set data=FOLDER"):
        eth_ucy(recordings, "hotel")
    with pytest.raises(ValueError, match="fold 'oxford' is not one of eth, hotel, univ, zara1, zara2"):
        eth_ucy(recordings, "oxford")


# Made-up walkers


def test_walkers_stay_near_their_square_and_walk_like_people() -> None:
    rng = torch.Generator().manual_seed(3)
    walked = tracks._walk(2000, 20, tracks._exits(rng), rng)
    assert float(walked.abs().max()) <= AREA + MARGIN
    speed = (walked[:, 1:] - walked[:, :-1]).norm(dim=2) / tracks.SECONDS
    assert float(speed.max()) < 3
    assert float(speed.median()) == pytest.approx(1.3, abs=0.1)
    # About one in thirteen stands still for a while.
    assert 0.05 < float((speed < 0.11).any(1).float().mean()) < 0.1


def test_walkers_do_not_walk_through_the_obstacle() -> None:
    rng = torch.Generator().manual_seed(3)
    exits = tracks._exits(rng)
    assert 3 <= len(exits) <= 5
    assert torch.allclose(exits.abs().amax(1), torch.full((len(exits),), AREA))
    walked = tracks._walk(4000, 20, exits, rng)
    outside = (walked[:, 0].norm(dim=1) > 3)[:, None] & (walked.norm(dim=2) < tracks.DISC / 2)
    assert float(outside.any(1).float().mean()) < 0.02


def test_where_somebody_goes_is_not_known_from_where_they_come() -> None:
    world = pedestrians(0, train=3000, test=10)
    past = world.train[:, :8].flatten(1)
    nearest = torch.cdist(past, past).fill_diagonal_(torch.inf).argmin(1)
    apart = (world.train[:, -1] - world.train[nearest, -1]).norm(dim=1)
    assert float(apart.median()) < 3
    assert float((apart > 4).float().mean()) > 0.1


def test_tracks_are_a_function_of_the_seed_and_apart() -> None:
    one, again, other = pedestrians(0, 50, 20), pedestrians(0, 50, 20), pedestrians(1, 50, 20)
    assert torch.equal(one.train, again.train)
    assert torch.equal(one.test, again.test)
    assert not torch.equal(one.train, other.train)
    assert one.train.shape == (50, 20, 2)
    assert float(torch.cdist(one.train.flatten(1), one.test.flatten(1)).min()) > 0


def test_positions_are_relative_to_the_last_that_is_seen() -> None:
    world = pedestrians(0, 50, 20)
    assert not world.train[:, 7].any()
    moved = centred(world.train + torch.tensor([100.0, -50]), 8)
    assert torch.allclose(moved, world.train, atol=1e-4)


# Tasks


def test_rows_of_both_tasks_are_the_same_tracks() -> None:
    world, rng = pedestrians(0, 30, 10), torch.Generator().manual_seed(0)
    whole = world.positions().collect({}, {}, rng, 30)
    assert whole.context["past"].shape == (30, 1, 2)
    assert whole.actions.shape == (30, 19, 2)
    coming = world.futures().collect({}, {}, rng.manual_seed(0), 30)
    assert coming.context["past"].shape == (30, 8, 2)
    assert torch.equal(coming.actions, whole.actions[:, 7:])


class Knowing:
    """Forecasts one straight way, and one to the east."""

    def forecast(self, past: Tensor) -> Tensor:
        ahead = torch.arange(1.0, 13)[None, :, None]
        straight = ahead * (past[:, -1:] - past[:, -2:-1])
        return torch.stack([straight, (ahead * torch.tensor([1.0, 0])).expand_as(straight)], 1)

    def destinations(self, past: Tensor) -> tuple[Tensor, None]:
        return self.forecast(past)[:, :, -1], None


def test_forecasts_are_measured_in_batches_and_beside_straight_lines() -> None:
    ahead = torch.arange(-7.0, 13)[None, :, None]
    test = torch.cat([ahead * torch.tensor([1.0, 0]), ahead * torch.tensor([0, 2.0]), ahead * torch.tensor([0, 1.0])])
    test[2, 8:] = ahead[0, 8:] * torch.tensor([1.0, 0])
    task = TracksWorld(test, test, batch_size=2).forecasts()
    found = task.evaluate({"policy": Knowing()}, {}, torch.Generator()).metrics
    assert found["ade"] == found["fde"] == found["destination_fde"] == 0
    assert found["velocity_fde"] == pytest.approx(12 * 2**0.5 / 3)
    assert found["velocity_ade"] == pytest.approx(6.5 * 2**0.5 / 3)
    assert found["line_fde"] == pytest.approx(found["velocity_fde"], abs=1e-4)
    assert set(found) == {
        *("ade", "fde", "central_ade", "central_fde", "velocity_ade", "velocity_fde"),
        *("line_ade", "line_fde", "destination_fde"),
    }


def test_tasks_pass_the_checks() -> None:
    world = pedestrians(0, 30, 10)
    policy = tiny_policy()
    for task in (world.positions(), world.futures(), world.forecasts(2)):
        assert check(task, cast={"policy": policy}).messages == []
    forecast = world.forecasts(3).collect({"policy": policy}, Knobs.of(policy), torch.Generator(), 6)
    assert forecast.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(forecast.context["past"][0], forecast.context["past"][2])


def test_an_evaluation_does_not_draw() -> None:
    world, policy = pedestrians(0, 30, 10), tiny_policy()
    first: Any = world.forecasts().evaluate({"policy": policy}, {}, torch.Generator().manual_seed(0)).metrics
    assert first == world.forecasts().evaluate({"policy": policy}, {}, torch.Generator().manual_seed(9)).metrics
