"""Text prompts: rows of fields, a template that reads fields and knobs, and evaluation on held-out rows."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.policies.base import Policy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.prompts import Evaluator, PromptTask
from regimen.tasks.rows import Order, check_finite

Row = Mapping[str, Any]
Template = str | Callable[[Row, Mapping[str, float]], str]
ROW_KEY = "row_key"
# In this order: a truth value is an int too, and an int is a float too.
_KINDS: dict[str, Any] = {
    "bool": bool,
    "int": Integral,
    "float": Real,
    "Tensor": Tensor,
    "str": str,
    "list": (list, tuple, dict),
}


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object (file, line number and remedy are named), or there are no rows.
    """
    rows = []
    # Not splitlines(), which also splits at separators that JSON allows inside a string.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); a JSON-lines file has one "
                "complete object per line, so repair or remove this line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: a {type(row).__name__}, expected an object such as "
                '{"question": ..., "answer": ...}'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object per line")
    return rows


def read_records(path: str | Path, held_out: int, *needed: str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, which must be more than are held out, each with the fields needed.

    Raises:
        ValueError: there are too few lines, or a record lacks a field; see also `read_json_lines`.
    """
    records = read_json_lines(path)
    if len(records) <= held_out:
        raise ValueError(
            f"{path} has {len(records)} lines, of which held_out={held_out} are for evaluation and none would be left "
            f"to train on; expected at least {held_out + 1}"
        )
    for number, record in enumerate(records):
        if absent := [name for name in needed if not record.get(name)]:
            raise ValueError(
                f"{path}, record {number}: no '{absent[0]}'; it has {', '.join(record)}, expected {', '.join(needed)}"
            )
    return records


def read_dataset(name: str, split: str = "train", config: str | None = None) -> list[dict[str, Any]]:
    """The rows of a data set on the Hugging Face hub (or a local folder of one); extra `datasets`.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("read_dataset needs datasets: pip install 'regimen-rl[datasets]'") from error
    return [dict(row) for row in datasets.load_dataset(name, config, split=split)]


def row_key(row: Row) -> int:
    """A content hash of a row, the same on every machine and in every order of its fields: 63 bits."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_as_json)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


def split_rows(rows: Sequence[Row], share: float, by: str | None = None) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and about `share` of them held out; chosen by content, so that equal rows stay together.

    Args:
        rows: any rows.
        share: of the rows held out, in (0, 1).
        by: the field whose content decides; the whole row by default.

    Raises:
        ValueError: the share is not inside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"split_rows: share {share}, expected a number between 0 and 1")
    limit = share * 2**63
    held = [row_key(row if by is None else {by: row[by]}) < limit for row in rows]
    return [r for r, h in zip(rows, held, strict=True) if not h], [r for r, h in zip(rows, held, strict=True) if h]


def text_table(rows: Sequence[Row], fields: Sequence[str] | None = None, owner: str = "text_table") -> TensorDict:
    """A table `[N]` of rows of fields, with the column `row_key`, a content hash of each row.

    Numbers become int64 or float64, truth values bool, tensors are stacked, texts stay texts, and lists and
    mappings become JSON texts.

    Args:
        rows: mappings with the same fields.
        fields: the fields to keep; all by default.
        owner: who asks, for errors.

    Raises:
        ValueError: no rows, or a field that is missing, null, NaN, too large for int64, or of different kinds in
            different rows.
    """
    if not rows:
        raise ValueError(f"{owner} was given no rows; expected at least one")
    names = list(dict.fromkeys(name for row in rows for name in row)) if fields is None else list(fields)
    table = TensorDict({}, batch_size=[len(rows)])
    for name in names:
        for number, row in enumerate(rows):
            if row.get(name) is None:
                what = "null" if name in row else "missing"
                raise ValueError(
                    f"{owner}: field '{name}' is {what} in row {number}, which has {', '.join(row)}; fill it, drop the "
                    "row, or name the fields to keep with fields=[...]"
                )
        table.set(name, _column([row[name] for row in rows], name, owner))
    table.set(ROW_KEY, torch.tensor([row_key({name: row[name] for name in names}) for row in rows]))
    check_finite(table, owner)
    return table


def _column(values: list[Any], name: str, owner: str) -> Any:
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1 and kinds != {"int", "float"}:
        found = ", ".join(sorted(kinds))
        raise ValueError(f"{owner}: field '{name}' holds values of kinds {found}; expected one kind in all rows")
    if kinds == {"str"}:
        return NonTensorStack(*values)
    if kinds == {"list"}:
        return NonTensorStack(*(json.dumps(value, ensure_ascii=False) for value in values))
    try:
        if kinds == {"Tensor"}:
            return torch.stack(values)
        dtype = torch.float64 if "float" in kinds else torch.int64 if "int" in kinds else None
        return torch.tensor(values, dtype=dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: field '{name}' does not fit a column ({error}); expected tensors of one shape, numbers within "
            "int64 or float64, texts, lists or mappings"
        ) from error


def _kind(value: Any) -> str:
    for name, types in _KINDS.items():
        if isinstance(value, types):
            return name
    return type(value).__name__


def render(template: Template, rows: TensorDict, knobs: Mapping[str, float]) -> list[str]:
    """A prompt for each row of a table, from its fields and the knobs in force.

    A format string names both in braces (`"{question} Use exactly {token_budget} tokens."`); whole numbers are
    written without a decimal point. A function is given the fields of a row, and the knobs. Fields of several
    numbers (images) are not for prompts.
    """
    values = {name: _whole(value) for name, value in knobs.items()}
    fields = {name: rows.get(name).tolist() for name in readable_fields(rows)}
    each = [{name: _whole(column[i]) for name, column in fields.items()} for i in range(len(rows))]
    if callable(template):
        return [template(row, values) for row in each]
    return [string.Formatter().vformat(template, (), {**values, **row}) for row in each]


def readable_fields(rows: TensorDict) -> list[str]:
    """The fields of a table that a template may read: texts, and one number per row."""
    return [name for name, value in rows.items() if not isinstance(value, Tensor) or value.ndim == 1]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_template(template: Template, fields: Sequence[str], declared: Sequence[str], owner: str) -> None:
    """Raise `ValueError` if a format string names what is neither a field nor a knob, or what is both."""
    if both := sorted(set(fields) & set(declared)):
        raise ValueError(f"{owner}: '{both[0]}' is a field of the rows and a knob; rename the field")
    if callable(template):
        return
    try:
        parsed = string.Formatter().parse(template)
        named = [re.split(r"[.\[]", name)[0] for _, name, _, _ in parsed if name is not None]
    except ValueError as error:
        raise ValueError(f"{owner}: template {template!r:.80}: {error}; write literal braces twice") from error
    for name in named:
        if name not in fields and name not in declared:
            raise ValueError(
                f"{owner}: the template names '{{{name}}}', which is neither a field ({', '.join(fields)}) nor a knob "
                f"({', '.join(declared) or 'none'}); declare a knob with reads=[Knob('{name}', ...)], and write "
                "literal braces twice"
            )


def _named(table: TensorDict) -> list[str]:
    return sorted(set(readable_fields(table)) - {ROW_KEY})


def ask(
    policy: Policy,
    template: Template,
    rows: TensorDict,
    knobs: Mapping[str, float],
    rng: torch.Generator,
    shown: Sequence[str] = (),
) -> Rollout:
    """A policy's answers to some rows: its context is the `prompt`, its columns are the rows' fields.

    Args:
        policy: samples answers to contexts with an entry `prompt`.
        template: see `render`.
        rows: table `[B]`, see `text_table`.
        knobs: the values in force, for the template and for the policy.
        rng: random stream.
        shown: fields that the policy gets beside the prompt (an image).

    Raises:
        ValueError: a field has the name of a column that the policy gives.
    """
    context = rows.select(*shown).set("prompt", NonTensorStack(*render(template, rows, knobs)))
    rollout = policy.sample(context.to(rng.device), knobs, rng)
    columns = rows.exclude(*shown).to(rng.device)
    if clash := sorted(set(columns.keys()) & set(rollout.columns.keys())):
        raise ValueError(f"the policy gives a column '{clash[0]}' itself; rename this field of the rows")
    return rollout.with_columns(**dict(columns.items()))


class TextPromptTask(PromptTask):
    """Samples `group_size` answers of a policy to every prompt made of a row, as `PromptTask` does of contexts.

    The values of the knobs in force are in the rollout, so that a judge reads the budget that the prompt stated.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        template: Template = "{question}",
        *,
        reads: Sequence[Knob] = (),
        fields: Sequence[str] | None = None,
        shown: Sequence[str] = (),
        group_size: int = 1,
        evaluate: Evaluator | None = None,
        order: Order = "shuffle",
        member: str = "policy",
        evaluated: str | None = None,
    ) -> None:
        """Make a task of rows.

        Args:
            name: unique within a regimen.
            rows: mappings of fields, as in `text_table`; see `read_json_lines` and `read_dataset`.
            template: turns a row into a prompt; see `render`.
            reads: the knobs that the template reads.
            fields: the fields to keep; all by default.
            shown: fields that the policy gets beside the prompt (an image); all others are columns for rewards.
            group_size, evaluate, order, member, evaluated: as in `PromptTask`.

        Raises:
            ValueError: rows that do not fit a table, or a template that names what is not there.
        """
        table = text_table(rows, fields, f"task '{name}'")
        check_template(template, _named(table), [knob.name for knob in reads], f"task '{name}'")
        super().__init__(
            name, table, group_size=group_size, evaluate=evaluate, order=order, member=member, evaluated=evaluated
        )
        self.template, self.reads, self.shown = template, tuple(reads), tuple(shown)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that the template reads."""
        return self.reads

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size // group_size` rows, each answered `group_size` times."""
        asked = _Asked(cast[self.member], self.template, self.shown)
        return super().collect({self.member: asked}, knobs, rng, size)


class _Asked:
    """A policy that answers rows instead of contexts."""

    def __init__(self, policy: Policy, template: Template, shown: Sequence[str]) -> None:
        self.policy, self.template, self.shown = policy, template, shown

    def sample(self, rows: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        return ask(self.policy, self.template, rows, knobs, rng, self.shown)


class TextEvaluator:
    """Measures a policy's answers to held-out rows: an `evaluate` for text tasks."""

    def __init__(
        self,
        rows: Sequence[Row],
        template: Template,
        measures: Mapping[str, Callable[[Rollout], Tensor]],
        *,
        knobs: Mapping[str, float] | None = None,
        fields: Sequence[str] | None = None,
        shown: Sequence[str] = (),
        samples: int = 8,
        batch_size: int = 256,
    ) -> None:
        """Make an evaluator.

        Args:
            rows, template, fields, shown: as in `TextPromptTask`.
            measures: named functions, rollout -> `[B]`; the metric is the mean over all rows.
            knobs: values that hold while evaluating (`{"temperature": 0, "token_budget": 24}`).
            samples: texts to show.
            batch_size: rows that are answered at once.
        """
        self.rows = text_table(rows, fields, "TextEvaluator")
        self.template, self.measures, self.knobs = template, dict(measures), dict(knobs or {})
        self.shown, self.samples, self.batch_size = tuple(shown), samples, batch_size

    def __call__(self, policy: Policy, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """The mean of every measure, and the first prompts with their answers.

        Raises:
            ValueError: the template names what is neither a field nor a knob in force.
        """
        in_force = {**knobs, **self.knobs}
        # Not all knobs in force are the template's: one that has the name of a field does no harm.
        fields = _named(self.rows)
        check_template(self.template, fields, [name for name in in_force if name not in fields], "TextEvaluator")
        totals, texts = dict.fromkeys(self.measures, 0.0), list[str]()
        for rows in self.rows.split(self.batch_size):
            rollout = ask(policy, self.template, rows, in_force, rng, self.shown)
            for name, measure in self.measures.items():
                totals[name] += float(measure(rollout).double().sum())
            if len(texts) < self.samples:
                texts += [f"{a}\n{b}" for a, b in zip(rollout.context["prompt"], rollout["text"], strict=True)]
        metrics = {name: total / len(self.rows) for name, total in totals.items()}
        return Evaluation(metrics, {"answers": texts[: self.samples]} if texts else {})
