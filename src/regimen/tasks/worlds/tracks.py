"""Tracks of pedestrians to be forecast: eight positions are seen, twelve are to come, one every 0.4 s.

Positions are metres, relative to the last one that is seen. A context holds `past [P, 2]`; actions are the positions
that follow it. `pedestrians` makes tracks up, `read_tracks` reads recorded ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.trajectories import central, min_ade, min_fde, straight_on
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask

SECONDS = 0.4
"""Between two positions."""

AREA, MARGIN, EXIT, DISC = 6.0, 3.0, 1.0, 0.8
"""Metres: half the side of the square, what it may be left by, how near an exit is reached, the obstacle's radius."""

FOLDS: dict[str, tuple[str, ...]] = {
    "eth": ("biwi_eth",),
    "hotel": ("biwi_hotel",),
    "univ": ("students001", "students003"),
    "zara1": ("crowds_zara01",),
    "zara2": ("crowds_zara02",),
}
"""The five folds of ETH and UCY: the recordings that each is tested on."""

EXTRA = ("crowds_zara03", "uni_examples")
"""Recordings that every fold trains on."""


@dataclass(frozen=True)
class TracksWorld:
    """Tracks to learn from, and others to be tested on.

    Attributes:
        train: `[N, P + T, 2]`; test: `[M, P + T, 2]`, relative to position `past`.
        past: positions that are seen, `P`.
        batch_size: tracks that are forecast at once in evaluation.
    """

    train: Tensor
    test: Tensor
    past: int = 8
    batch_size: int = 1000

    def positions(self) -> DatasetTask:
        """Whole tracks, step by step from their first position."""
        return DatasetTask("positions", _rows(self.train, 1))

    def futures(self) -> DatasetTask:
        """What is to come, given the past."""
        return DatasetTask("futures", _rows(self.train, self.past))

    def forecasts(self, group_size: int = 1) -> PromptTask:
        """Pasts that a forecaster goes on from; it is evaluated on the tracks for testing."""
        contexts = _rows(self.train, self.past)["context"]
        return PromptTask("forecasts", contexts, group_size=group_size, evaluate=self._evaluate)

    def _evaluate(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Displacements in metres: best of `K`, the most central forecast, the destinations, and straight lines."""
        ways, ends = [], []
        for tracks in self.test.split(self.batch_size):
            past = tracks[:, : self.past].to(rng.device)
            ways.append(policy.forecast(past).cpu())
            with torch.no_grad():
                ends.append(policy.destinations(past)[0].cpu())
        past, truth = self.test[:, : self.past], self.test[:, self.past :]
        forecast, destinations = torch.cat(ways), torch.cat(ends)
        middle = forecast[torch.arange(len(forecast)), central(forecast[:, :, -1])][:, None]
        shown = {
            "": forecast,
            "central_": middle,
            "velocity_": straight_on(past, truth.shape[1])[:, None],
            "line_": straight_on(past, truth.shape[1], self.past)[:, None],
        }
        metrics = {f"{name}ade": float(min_ade(paths, truth)) for name, paths in shown.items()}
        metrics |= {f"{name}fde": float(min_fde(paths, truth)) for name, paths in shown.items()}
        metrics["destination_fde"] = float(min_fde(destinations[:, :, None], truth[:, -1:]))
        return Evaluation(metrics)


def _rows(tracks: Tensor, seen: int) -> TensorDict:
    context = TensorDict({"past": tracks[:, :seen]}, [len(tracks)])
    return TensorDict({"context": context, "actions": tracks[:, seen:]}, [len(tracks)])


def centred(tracks: Tensor, past: int) -> Tensor:
    """Tracks `[N, L, 2]` relative to their last position that is seen, number `past`."""
    return tracks - tracks[:, past - 1 : past]


# Made-up pedestrians


def pedestrians(seed: int, train: int = 4000, test: int = 1000, past: int = 8, future: int = 12) -> TracksWorld:
    """One square with an obstacle and three to five exits; where somebody goes is not known from where they come.

    Args:
        seed: of exits and tracks.
        train, test: tracks.
        past, future: positions of each that are seen, and that are to come.
    """
    rng = torch.Generator().manual_seed(seed)
    exits = _exits(rng)
    tracks: list[Tensor] = []
    while sum(map(len, tracks)) < train + test:
        tracks.append(_walk(2 * (train + test), past + future, exits, rng))
    found = centred(torch.cat(tracks)[: train + test], past)
    return TracksWorld(found[:train], found[train:], past)


def _exits(rng: torch.Generator) -> Tensor:
    """`[E, 2]`, on the square's border, one in each of as many equal parts of its round."""
    count = int(torch.randint(3, 6, (), generator=rng))
    angle = (torch.arange(count) + torch.rand(count, generator=rng)) * (2 * math.pi / count)
    way = _direction(angle)
    return AREA * way / way.abs().amax(1, keepdim=True)


def _walk(count: int, length: int, exits: Tensor, rng: torch.Generator) -> Tensor:
    """Tracks `[N, length, 2]` of those of `count` walkers who stay on the square or near it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    place = (2 * uniform(count, 2) - 1) * AREA
    heading = _direction(2 * math.pi * uniform(count))
    aim = _choose(place, heading, exits, rng)
    usual = (1.3 + 0.25 * normal(count, 1)).clamp(min=0.3)
    speed = usual.clone()
    # One in seven stops for a while, or turns to an exit chosen anew.
    event, moment = uniform(count, 1), torch.randint(2, length - 2, (count, 1), generator=rng)
    pause = torch.randint(3, 7, (count, 1), generator=rng)
    stops, turns = event < 0.075, (event >= 0.075) & (event < 0.15)
    visited = [place]
    for step in range(1, length):
        turning = turns & (moment == step)
        aim = torch.where(turning, exits[torch.randint(len(exits), (count,), generator=rng)], aim)
        heading = _turned(place, heading, aim, 0.05 * normal(count, 2))
        standing = stops & (step >= moment) & (step < moment + pause)
        speed = 0.9 * speed + 0.1 * usual + 0.03 * normal(count, 1)
        place = place + SECONDS * torch.where(standing, 0.1, speed.clamp(min=0.1)) * heading
        visited.append(place)
    track = torch.stack(visited, 1)
    return track[(track.abs() <= AREA + MARGIN).flatten(1).all(1)]


def _choose(place: Tensor, heading: Tensor, exits: Tensor, rng: torch.Generator) -> Tensor:
    """An exit `[N, 2]` for each walker, the likelier the less it has to turn."""
    ahead = (_unit(exits - place[:, None]) * heading[:, None]).sum(2)
    drawn = torch.multinomial((2 * ahead).softmax(1), 1, generator=rng).squeeze(1)
    return exits[drawn]


def _turned(place: Tensor, heading: Tensor, aim: Tensor, noise: Tensor) -> Tensor:
    """The next heading `[N, 2]`: some of the way to the aim, around the obstacle; straight on once the exit is near."""
    near = (aim - place).norm(dim=1, keepdim=True) < EXIT
    desired = torch.where(near, heading, _unit(aim - place))
    side = torch.stack([-place[:, 1], place[:, 0]], 1)
    side = _unit(side) * (side * desired).sum(1, keepdim=True).sign()
    blocked = place.norm(dim=1, keepdim=True) < DISC + 1
    return _unit(0.7 * heading + 0.3 * (desired + torch.where(blocked, 0.8 * side, 0)) + noise)


def _direction(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-6)


# Recorded ones


def eth_ucy(folder: str | Path, fold: str, past: int = 8, future: int = 12, stride: int = 1) -> TracksWorld:
    """The recordings of ETH and UCY but those of one fold to learn from, and those to be tested on.

    Args:
        folder: with the files of `FOLDS` and `EXTRA`, each `<name>.txt`, as `read_tracks` reads them.
        fold: one of `FOLDS`.
        past, future: positions of a track that are seen, and that are to come.
        stride: positions between the starts of two tracks of a person, of those to learn from.

    Raises:
        ValueError: an unknown fold, or files that cannot be read as tracks.
        FileNotFoundError: files are not there.
    """
    if fold not in FOLDS:
        raise ValueError(f"eth_ucy: fold '{fold}' is not one of {', '.join(FOLDS)}")
    every = [*(name for names in FOLDS.values() for name in names), *EXTRA]
    if absent := [name for name in every if not (Path(folder) / f"{name}.txt").is_file()]:
        raise FileNotFoundError(
            f"the folder of recordings {str(folder)!r} lacks {', '.join(f'{name}.txt' for name in absent)}; they do "
            "not come with the library: name a folder that holds them (--set data=FOLDER)"
        )

    def read(names: Sequence[str], stride: int) -> Tensor:
        files = [Path(folder) / f"{name}.txt" for name in names]
        return centred(torch.cat([read_tracks(file, past, future, stride) for file in files]), past)

    return TracksWorld(read([name for name in every if name not in FOLDS[fold]], stride), read(FOLDS[fold], 1), past)


def read_tracks(path: str | Path, past: int = 8, future: int = 12, stride: int = 1, frame_step: float = 10) -> Tensor:
    """Tracks `[N, past + future, 2]` of a recording, as they are there; every stretch of a person without a gap.

    Args:
        path: a text file, each line `frame person x y` with blanks or tabs between, in the order of frames.
        past, future: positions of a track.
        stride: positions between the starts of two tracks of a person.
        frame_step: frames between two positions.

    Raises:
        ValueError: a line that is not four finite numbers, frames out of order, a person twice in a frame, or nobody
            who is seen long enough; with the file and the line.
        FileNotFoundError: there is no such file.
    """
    length = past + future
    if min(past, future, stride) < 1 or frame_step <= 0:
        raise ValueError(f"read_tracks: past={past}, future={future}, stride={stride}, frame_step={frame_step}")
    stretches = _stretches(Path(path), frame_step)
    found = [
        stretch[start : start + length]
        for stretch in stretches
        for start in range(0, len(stretch) - length + 1, stride)
    ]
    if not found:
        longest = max(map(len, stretches), default=0)
        raise ValueError(
            f"{path}: nobody is seen for {length} positions without a gap (the longest is {longest}, one every "
            f"{frame_step:g} frames); ask for shorter tracks, or give the recording's own frame_step"
        )
    return torch.tensor(found)


def _stretches(path: Path, frame_step: float) -> list[list[tuple[float, float]]]:
    """Positions of a person without a gap, in the order in which they begin."""
    found: list[list[tuple[float, float]]] = []
    open_: dict[float, tuple[float, list[tuple[float, float]]]] = {}
    before = -math.inf
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        frame, person, x, y = _numbers(line, path, number)
        if frame < before:
            raise ValueError(
                f"{path}, line {number}: frame {frame:g} comes after frame {before:g}; sort the lines by frame"
            )
        before = frame
        last, stretch = open_.get(person, (-math.inf, []))
        if frame == last:
            raise ValueError(f"{path}, line {number}: person {person:g} is there twice in frame {frame:g}; drop one")
        if frame - last != frame_step:
            stretch = []
            found.append(stretch)
        stretch.append((x, y))
        open_[person] = (frame, stretch)
    return found


def _numbers(line: str, path: Path, number: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in line.split())
    except ValueError:
        values = ()
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ValueError(f"{path}, line {number}: '{line.strip()[:80]}'; expected 'frame person x y', finite numbers")
    return values
