"""How the cost of a GRPO step on tokens grows with the batch, the completions' length, the groups and the model.

`python -m benchmarks.growth [--save FILE] [--plot FILE]`

Each panel moves one number and keeps the others: 64 samples of 64 tokens in groups of 8, a decoder of width 64 with 3
layers. A step is an iteration of `train`: sampling, reward, credit, one gradient step. What is counted are the seconds
of processor time of one thread, so that other work on the machine adds little; the median of three steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.harness import machine
from benchmarks.language import Size, decoder, even_words, prompts, tokenizer
from regimen import Cast, Event, Regimen, Rollout, Stage, Update, train
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import TokenPolicy
from regimen.rewards import FunctionReward
from regimen.tasks.text import TextPromptTask

WARM_UP, STEPS = 1, 3


@dataclass(frozen=True)
class Work:
    """One step's work: samples, tokens of each, samples of a prompt, width of the model."""

    batch: int = 64
    length: int = 64
    group: int = 8
    width: int = 64

    @property
    def size(self) -> Size:
        """The model."""
        return Size(words=60, dim=self.width, layers=3, heads=4)


@dataclass(frozen=True)
class Panel:
    """One number that is moved.

    Attributes:
        title: what grows; axis: the name of its axis.
        works: in order.
        ideal: slope of seconds against `x`, both as logarithms, if nothing but arithmetic cost time.
    """

    title: str
    axis: str
    works: Sequence[Work]
    ideal: float


PANELS = {
    "batch": Panel("batch", "samples in a step", [Work(batch=n) for n in (16, 32, 64, 128, 256)], 1),
    "length": Panel("completions", "tokens of a completion", [Work(length=n) for n in (12, 24, 48, 96, 192)], 1),
    "group": Panel("groups", "samples of a prompt", [Work(group=n) for n in (2, 4, 8, 16, 32)], 0),
    "model": Panel("model", "parameters", [Work(width=n) for n in (32, 64, 128, 256, 384)], 1),
}


@dataclass(frozen=True)
class Growth:
    """A panel's measurements: `x`, seconds of a step, the slope fitted to all, and that between the last two."""

    x: list[int]
    seconds: list[float]
    ideal: float

    @property
    def slope(self) -> float:
        """Least squares on both logarithms."""
        return float(np.polyfit(np.log(self.x), np.log(self.seconds), 1)[0])

    @property
    def last(self) -> float:
        """The slope between the two largest values."""
        return float(np.diff(np.log(self.seconds[-2:]))[0] / np.diff(np.log(self.x[-2:]))[0])


def seconds(work: Work) -> tuple[int, float]:
    """The model's parameters, and the median of a step's seconds."""
    ends = [0.0]

    def listen(event: Event) -> None:
        if event.kind == "step":
            ends.append(time.process_time())

    def score(rollout: Rollout) -> torch.Tensor:
        return torch.tensor([even_words(text) for text in rollout["text"].tolist()])

    model = decoder(work.size, 0)
    policy = TokenPolicy(model, tokenizer(work.size), max_new_tokens=work.length)
    rows = [{"prompt": text} for text in prompts(work.batch // work.group, work.size, 0)]
    stage = Stage(
        "grpo",
        [TextPromptTask("words", rows, "{prompt}", group_size=work.group)],
        WARM_UP + STEPS,
        work.batch,
        reward=FunctionReward(score, "even_words"),
        credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective(), learning_rate=1e-4)],
    )
    train(Regimen(Cast(policy=policy), [stage], evaluations=[]), listener=listen)
    return sum(p.numel() for p in model.parameters()), statistics.median(np.diff(ends)[WARM_UP:])


def measured(name: str) -> Growth:
    """The panel's step, at every value."""
    panel = PANELS[name]
    found = [seconds(work) for work in panel.works]
    x = [size if name == "model" else getattr(work, name) for work, (size, _) in zip(panel.works, found, strict=True)]
    return Growth(x, [spent for _, spent in found], panel.ideal)


def figure(growths: dict[str, Growth]) -> Figure:
    """Four panels on logarithmic axes: what was measured, the fit, and the ideal through the largest value."""
    drawn = Figure(figsize=(9.6, 6.8), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(2, 2, sharey=True).flat
    for area, (name, growth) in zip(axes, growths.items(), strict=True):
        _panel(area, PANELS[name], growth)
    for area in drawn.axes[::2]:
        area.set_ylabel("seconds of a step")
    drawn.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return drawn


def _panel(axes: Axes, panel: Panel, growth: Growth) -> None:
    x, y = np.array(growth.x, float), np.array(growth.seconds)
    axes.loglog(x, y[-1] * (x / x[-1]) ** growth.ideal, "--", color="#888888", linewidth=1.2, label="ideal")
    centre = np.exp(np.log(x).mean()), np.exp(np.log(y).mean())
    axes.loglog(x, centre[1] * (x / centre[0]) ** growth.slope, color="#0072B2", linewidth=1.2, label="fit")
    axes.loglog(x, y, "o", color="#D55E00", label="measured")
    axes.set_title(
        f"{panel.title}: slope {growth.slope:.2f}, {growth.last:.2f} at the end (ideal {growth.ideal:g})", fontsize=10
    )
    axes.set_xlabel(panel.axis)
    axes.set_xticks(growth.x, [f"{v / 1e6:.2g} M" if v > 1e4 else str(v) for v in growth.x])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(min(y.min(), 0.05), max(y.max(), 5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.6)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--save", type=Path, help="results file (JSON)")
    parser.add_argument("--plot", type=Path, help="image file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    growths = {}
    for name in PANELS:
        growths[name] = growth = measured(name)
        shown = ", ".join(f"{x:,}: {s:.3g} s" for x, s in zip(growth.x, growth.seconds, strict=True))
        print(f"{name}: slope {growth.slope:.2f}, {growth.last:.2f} at the end (ideal {growth.ideal:g}); {shown}")
    if options.save:
        rows = {name: {**asdict(growth), "slope": growth.slope} for name, growth in growths.items()}
        kept = {"panels": rows, "base": asdict(Work()), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
        options.save.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    if options.plot:
        figure(growths).savefig(options.plot)


if __name__ == "__main__":
    main()
