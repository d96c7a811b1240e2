"""Decoding that is guided from outside: several ways to go on are tried, and the one that is judged best is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.policies.decoding import Completions
from regimen.policies.sequences import Sequences
from regimen.policies.stopping import StopAt
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout

Judge = Callable[[Rollout], Tensor]
"""Texts as far as they have come, to how good they are, `[B]`."""


class GuidedDecoding:
    """A sampler around a `TokenPolicy`: in each round it draws `candidates` ways to go on, and keeps the best judged.

    A way to go on ends at a text of `until`, after `chunk` tokens, or where the policy's answer ends. One chunk as long
    as the answer is best-of-n; one candidate is plain sampling. `candidates` times as many tokens are sampled as with
    plain sampling. What it says has no log-probability: it is not drawn from the policy's distribution.

    What all candidates have in common is read once per round. The knobs are the policy's own (`head/<objective>` of a
    `MultiHeadPolicy` among them).

    Source: arXiv 2510.01167, section 3.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        judge: Judge,
        *,
        candidates: int = 5,
        chunk: int = 256,
        until: Sequence[str] = (),
        rounds: int = 20,
    ) -> None:
        """Make the sampler.

        Args:
            policy: whose answers they are.
            judge: is given prompt and answer so far as a rollout, with the columns `text` and `truncated` (here:
                whether it goes on), and says how good each is, `[B]`; `ProcessValue.last`, or a sum of several.
            candidates: ways to go on that are tried.
            chunk: tokens of one at most.
            until: texts that end one, which stay part of it.
            rounds: at most; the answer is then cut off.

        Raises:
            ValueError: a number below 1.
        """
        if min(candidates, chunk, rounds) < 1:
            raise ValueError(
                f"GuidedDecoding: candidates={candidates}, chunk={chunk}, rounds={rounds}; expected at least 1 of each"
            )
        self.policy, self.judge = policy, judge
        self.candidates, self.chunk, self.rounds = candidates, chunk, rounds
        # The same policy, which also stops between chunks.
        self._chunks = copy.copy(policy)
        self._chunks.stop = StopAt(
            policy.tokenizer, [*policy.stop.texts, *until], [int(token) for token in policy.stop.ends]
        )

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The policy's."""
        return self.policy.knobs

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One answer per context; no log-probabilities."""
        prompts = list(contexts["prompt"].tolist())
        known = {prompt: self.policy.encode(prompt) for prompt in dict.fromkeys(prompts)}
        work = _Work([known[prompt] for prompt in prompts], contexts.to(self.policy.device), self.policy)
        limit = int(knobs["max_new_tokens"])
        for _ in range(self.rounds):
            if not work.active or not self._round(work, knobs, limit, rng):
                break
        return work.rollout(knobs)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Any:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "GuidedDecoding.distribution: its answers are chosen by a judge, so they are not drawn from a distribution "
            "that could be scored; score them with the policy itself"
        )

    def _round(self, work: _Work, knobs: Mapping[str, float], limit: int, rng: torch.Generator) -> bool:
        """Go on with every answer that has not ended; whether there was one with room left."""
        rows = [row for row in work.active if len(work.answers[row]) < limit]
        if not rows:
            return False
        room = max(limit - len(work.answers[row]) for row in rows)
        every = [row for row in rows for _ in range(self.candidates)]
        drawn = self._chunks.complete(
            [torch.cat([work.starts[row], work.answers[row]]) for row in every],
            {**knobs, "max_new_tokens": min(self.chunk, room)},
            rng,
        )
        tried = [
            torch.cat([work.answers[row], tokens[mask].cpu()])[:limit]
            for row, tokens, mask in zip(every, drawn.tokens, drawn.mask, strict=True)
        ]
        if self.candidates == 1:
            best = list(range(len(rows)))
        else:
            scores = self.judge(work.layout(every, tried)).view(len(rows), self.candidates)
            best = (scores.argmax(1) + torch.arange(len(rows), device=scores.device) * self.candidates).tolist()
        for row, place in zip(rows, best, strict=True):
            work.take(row, tried[place])
        return True


@dataclass
class _Work:
    """Answers as far as they have come.

    Attributes:
        starts: the prompts' tokens; contexts: table `[B]`; policy: who answers.
    """

    starts: list[Tensor]
    contexts: TensorDict
    policy: TokenPolicy

    def __post_init__(self) -> None:
        self.answers = [start[:0] for start in self.starts]
        self.ended = [False] * len(self.starts)

    @property
    def active(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, ended in enumerate(self.ended) if not ended]

    def take(self, row: int, answer: Tensor) -> None:
        """Commit to an answer so far."""
        self.answers[row], self.ended[row] = answer, self._ends(answer)

    def _ends(self, answer: Tensor) -> bool:
        return bool(self.policy.stop(answer.to(self.policy.device)[None], len(answer))[0])

    def layout(
        self, rows: Sequence[int], answers: Sequence[Tensor], knobs: Mapping[str, float] | None = None
    ) -> Rollout:
        """Some answers to the prompts of some rows, as a rollout."""
        device = self.policy.device
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        tokens[mask] = torch.cat(list(answers)).to(device)
        ended = torch.tensor([self._ends(answer) for answer in answers], device=device)
        starts = [self.starts[row] for row in rows]
        said = Completions(tokens, mask, torch.zeros(mask.shape, device=device), None, ended)
        sequences = Sequences.of(starts, [start[:0] for start in starts], said)
        fields: dict[str, Any] = sequences.fields(scored=False)
        return Rollout.create(
            task="policy",
            group=torch.arange(len(rows), device=device),
            context=self.contexts[torch.tensor(list(rows), device=device)],
            knobs=knobs,
            columns={"text": self.policy.decode(sequences.answer_tokens()), "truncated": ~ended},
            version=torch.full((len(rows),), self.policy.version, device=device),
            **fields,
        )

    def rollout(self, knobs: Mapping[str, float]) -> Rollout:
        """All answers."""
        return self.layout(range(len(self.starts)), self.answers, knobs)
