"""Demonstrations beside a policy's own answers: rows that somebody else has answered, in one rollout with samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.prompts import PromptTask
from regimen.tasks.text import Row, Template, TextPromptTask, render


class DemonstrationTask(TextPromptTask):
    """Rows with their answers, laid out as a token policy's samples are.

    A stage may collect from it and from a `TextPromptTask` whose rows have the same fields; each objective says whose
    samples it is for: `surrogate.on("questions") + SFTObjective().on("demonstrations")`. The stage's reward judges
    these answers too (samples to which it does not apply would leave the loss).

    Nobody sampled them: their log-probabilities are NaN, so that an objective that reads them does not pass unnoticed.
    They are counted as rows, not as samples.
    """

    generates = False

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        template: Template = "{question}",
        *,
        answer: str = "answer",
        member: str = "policy",
    ) -> None:
        """Make a task of rows.

        Args:
            name: unique within a regimen.
            rows: mappings of fields.
            template: turns a row into a prompt, see `render`.
            answer: the field with the answer, a text.
            member: the token policy whose tokenizer reads them.

        Raises:
            ValueError: as for `TextPromptTask`, or there is no such field.
        """
        super().__init__(name, rows, template, member=member)
        if answer not in self.rows.keys():  # noqa: SIM118
            raise ValueError(
                f"task '{name}': the rows have no field '{answer}' with the answer; they have {', '.join(rows[0])}"
            )
        self.answer = answer

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` rows as samples."""
        recorded = _Recorded(cast[self.member], self.template, self.answer)
        return PromptTask.collect(self, {self.member: recorded}, knobs, rng, size)


class _Recorded:
    """A policy that answers rows with what stands in them."""

    def __init__(self, policy: TokenPolicy, template: Template, answer: str) -> None:
        self.policy, self.template, self.answer = policy, template, answer

    def sample(self, rows: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        prompts, answers = render(self.template, rows, knobs), rows[self.answer].tolist()
        fields = self.policy.demonstrations(prompts, answers).to(rng.device)
        rollout = Rollout.create(
            task="policy",
            group=torch.arange(len(rows), device=rng.device),
            context={"prompt": prompts},
            knobs=knobs,
            version=torch.full((len(rows),), self.policy.version, device=rng.device),
            logprobs=torch.where(fields["loss_mask"], torch.nan, 0.0),
            **dict(fields.items()),
        )
        given = {"text": answers, "truncated": torch.zeros(len(rows), dtype=torch.bool, device=rng.device)}
        return rollout.with_columns(**given, **dict(rows.items()))
