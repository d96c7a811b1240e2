"""Rewards on a text's form: its length against a budget, and its tags. Also how rewards read texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regimen.functions.answers import tag_format, tag_text
from regimen.knobs import Knob
from regimen.rewards.base import FAILED, NOT_APPLICABLE, SCORED, Reward, Scene, Score
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Failure:
    """Why one sample could not be scored."""

    why: str


def score_each(values: Sequence[float | Failure | None], name: str, device: Any = None) -> Score:
    """A score from one outcome per sample: a number, a `Failure`, or `None` for *not applicable*.

    Different reasons are told once each, with the first sample that has it.
    """
    number = [value if isinstance(value, int | float) else math.nan for value in values]
    status = [FAILED if isinstance(value, Failure) else NOT_APPLICABLE if value is None else SCORED for value in values]
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if isinstance(value, Failure):
            first.setdefault(value.why, index)
    told = [f"reward '{name}', sample {index}: {why}" for why, index in first.items()]
    return Score(
        torch.tensor(number, dtype=torch.get_default_dtype(), device=device),
        torch.tensor(status, dtype=torch.uint8, device=device),
        tuple(told[:5]),
    )


def field_of(rollout: Rollout, name: str) -> list[Any]:
    """A side column, or else a context entry, as a list of `B` plain values.

    Raises:
        KeyError: the rollout has neither.
    """
    there = {**dict(rollout.context.items()), **dict(rollout.columns.items())}
    if name not in there:
        known = ", ".join(sorted(there)) or "none"
        raise KeyError(f"the rollout has no column or context entry '{name}'; it has: {known}")
    return list(there[name].tolist())


def own_steps(rollout: Rollout) -> Tensor:
    """Bool `[B, T]`: the policy's own steps, without forced and foreign ones."""
    return rollout.mask & rollout.loss_mask


def triangular_length(length: Tensor, budget: Tensor | float, high: float = 1.0) -> Tensor:
    """`high * max(0, 1 - |l - L| / L)`: 0 for nothing, `high` at the budget `L`, 0 again from `2 L` on.

    Source: Train Long, Think Short (arXiv 2508.08940), section 3. All arguments broadcast; the budget is above 0.
    """
    return high * (1 - (length - budget).abs() / budget).clamp(min=0)


def band_length(length: Tensor, budget: Tensor | float, high: float = 1.0) -> Tensor:
    """`high` up to the budget `L`, then linearly down to 0 at `2 L`. Source: arXiv 2508.08940, section 4."""
    return high * (1 - (length - budget).clamp(min=0) / budget).clamp(min=0)


def ramp_length(length: Tensor, budget: Tensor | float, high: float = 1.0) -> Tensor:
    """`high * min(1, l / L)`: longer is better up to the budget. Source: ToolRL (arXiv 2504.13958)."""
    return high * (length / budget).clamp(max=1)


_SHAPES = {"triangular": triangular_length, "band": band_length, "ramp": ramp_length}


class LengthReward(Reward):
    """A text's length against a budget, `[B]` in [0, high], component `length`.

    The budget is the value in force when the sample was drawn, as the rollout recorded it, so that the judge sees
    the budget that the prompt stated.
    """

    def __init__(
        self,
        shape: Literal["triangular", "band", "ramp"] = "triangular",
        budget: str | Knob | float = "token_budget",
        high: float = 1.0,
        of: str = "response",
        unit: Literal["tokens", "words"] = "tokens",
        *,
        count: Callable[[str], int] | None = None,
        prefix: str = "",
        name: str = "length",
    ) -> None:
        """Make the reward.

        Args:
            shape: see `triangular_length`, `band_length`, `ramp_length`.
            budget: a number; or the knob that holds it. A `Knob` is declared here; a name belongs to a knob that
                the task or the policy declares.
            high: value at the budget.
            of: `"response"`, or the tag whose content is measured (`"think"`). A text without the tag has length 0.
            unit: tokens of a response are the policy's own steps, its end token included.
            count: the tokens of a text, needed for the tokens inside a tag.
            prefix: what the prompt already opened (`"<think>"`), put before the text.
            name: of the component.

        Raises:
            ValueError: unknown shape or unit, a budget or `high` that is not positive, or no way to count.
        """
        if shape not in _SHAPES or unit not in ("tokens", "words"):
            raise ValueError(
                f"LengthReward: shape '{shape}', unit '{unit}'; expected {', '.join(_SHAPES)} and tokens, words"
            )
        if high < 0 or (isinstance(budget, int | float) and budget <= 0):
            raise ValueError(
                f"LengthReward: budget {budget}, high {high}; expected a budget above 0 and high of at least 0"
            )
        if of != "response" and unit == "tokens" and count is None:
            raise ValueError(
                f"LengthReward: cannot count the tokens inside <{of}>; give "
                "count=lambda text: len(tokenizer.encode(text)), or unit='words'"
            )
        self.shape, self.high, self.of, self.unit, self.prefix, self.name = shape, high, of, unit, prefix, name
        self.count = count if unit == "tokens" else _words
        self.budget = budget.name if isinstance(budget, Knob) else budget
        self.reads = (budget,) if isinstance(budget, Knob) else ()

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The shape's value at each text's length."""
        budget = self._budget(rollout)
        if bool((budget <= 0).any()):
            raise ValueError(f"budget '{self.budget}' was {float(budget.min())} in this rollout, expected above 0")
        return _SHAPES[self.shape](self.lengths(rollout), budget, self.high)

    def lengths(self, rollout: Rollout) -> Tensor:
        """`[B]`, the lengths that are scored."""
        if self.of == "response" and self.unit == "tokens":
            return own_steps(rollout).sum(1).to(torch.get_default_dtype())
        assert self.count is not None, "checked when made"
        texts = [self.prefix + text for text in field_of(rollout, "text")]
        if self.of != "response":
            texts = [tag_text(text, self.of) or "" for text in texts]
        lengths = [float(self.count(text)) for text in texts]
        return torch.tensor(lengths, device=rollout.mask.device)

    def _budget(self, rollout: Rollout) -> Tensor:
        if not isinstance(self.budget, str):
            return torch.full((len(rollout),), float(self.budget), device=rollout.mask.device)
        if self.budget not in rollout.knobs.keys():  # noqa: SIM118
            raise KeyError(
                f"no knob '{self.budget}' was in force when this rollout was sampled; declare it, as in "
                f"LengthReward(budget=Knob('{self.budget}', 256, low=1, integer=True))"
            )
        budget: Tensor = rollout.knobs[self.budget]
        return budget


def _words(text: str) -> int:
    return len(text.split())


class TagFormatReward(Reward):
    """Whether a text keeps a tag format, `[B]`, component `format`; see `tag_format`."""

    def __init__(
        self,
        tags: Sequence[str] = ("think", "answer"),
        weights: Sequence[float] | None = None,
        whole: bool = False,
        schema: Mapping[str, str] | None = None,
        *,
        prefix: str = "",
        name: str = "format",
    ) -> None:
        """Make the reward.

        Args:
            tags: names without brackets, in the order that they should have.
            weights: what each tag is worth; equal shares of 1 by default.
            whole: ask for the tags in order and nothing but white space outside them.
            schema: per tag, a regular expression that its stripped content must match in full.
            prefix: what the prompt already opened (`"<think>"`), put before the text.
            name: of the component.

        Raises:
            ValueError: no tags, a tag twice, weights that do not fit, or a schema for another tag.
        """
        if not tags or len(set(tags)) < len(tags):
            raise ValueError(f"TagFormatReward: tags are {list(tags)}, expected at least one, each once")
        shares = [1 / len(tags)] * len(tags) if weights is None else list(weights)
        if len(shares) != len(tags) or min(shares) < 0:
            raise ValueError(
                f"TagFormatReward: weights {shares} for tags {list(tags)}; expected one of at least 0 per tag"
            )
        if odd := sorted((schema or {}).keys() - set(tags)):
            raise ValueError(f"TagFormatReward: schema for {', '.join(odd)}, which is not among the tags {list(tags)}")
        self.weights = dict(zip(tags, shares, strict=True))
        self.whole, self.schema, self.prefix, self.name = whole, dict(schema or {}), prefix, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The weights of the tags that are in order."""
        texts = [self.prefix + text for text in field_of(rollout, "text")]
        values = [tag_format(text, self.weights, self.whole, self.schema) for text in texts]
        return torch.tensor(values, device=rollout.mask.device)
