"""Dialogues as they grow, and how they are laid out as the steps of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regimen.tasks.partners import Reply

if TYPE_CHECKING:
    from regimen.policies.decoding import Completions
    from regimen.policies.token import TokenPolicy


@dataclass(frozen=True)
class Said:
    """What the policy said in a turn, on the CPU.

    Attributes:
        tokens: int64 `[L]`, as they were sampled; logprobs: `[L]`; kept: int64 `[L]`, if truncated.
    """

    tokens: Tensor
    logprobs: Tensor
    kept: Tensor | None = None

    @classmethod
    def of(cls, answers: Completions) -> list[Said]:
        """One for each row."""
        lengths = answers.mask.sum(1).tolist()
        tokens, logprobs = answers.tokens.cpu(), answers.logprobs.cpu()
        kept = None if answers.kept is None else answers.kept.cpu()
        return [
            cls(tokens[row, :n], logprobs[row, :n], None if kept is None else kept[row, :n])
            for row, n in enumerate(lengths)
        ]


@dataclass(frozen=True)
class Turn:
    """What the policy heard (int64 `[H]`), what it then said, and what came of it."""

    heard: Tensor
    said: Said
    reply: Reply


@dataclass
class Dialogue:
    """One dialogue as it grows.

    Attributes:
        start: where it began.
        lines: the transcript.
        heard: int64 `[H]`, what the policy will read before it speaks again.
        turns: those it has had.
        over: it ended, or failed.
        success: as things stand.
        failure: why it failed.
    """

    start: int
    lines: list[str]
    heard: Tensor
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    success: bool = False
    failure: str = ""

    @classmethod
    def begun(cls, start: int, opening: Reply, policy: TokenPolicy, room: int) -> Dialogue:
        """A dialogue before the first turn. It has failed if the opening has, or does not fit into `room` tokens."""
        dialogue = cls(start, [opening.text], torch.empty(0, dtype=torch.int64))
        if opening.failure:
            return dialogue._failed(opening.failure, policy)
        try:
            dialogue.heard = policy.encode(opening.text)
        except ValueError as error:
            return dialogue._failed(str(error), policy)
        if len(dialogue.heard) > room:
            long = f"the opening has {len(dialogue.heard)} tokens, and there is room for {room} before an answer"
            return dialogue._failed(f"{long}; shorten it, or lower the knob max_new_tokens", policy)
        return dialogue

    def _failed(self, why: str, policy: TokenPolicy) -> Dialogue:
        # A sample needs a step, so one that never began has the end of a text.
        nothing = Said(self.heard[:0], torch.empty(0))
        self.turns = [Turn(torch.tensor([policy.tokenizer.eos_token_id]), nothing, Reply())]
        self.over, self.failure = True, why
        return self

    def take(self, said: Said, text: str, reply: Reply, policy: TokenPolicy) -> None:
        """Add a turn with the reply to it."""
        self.turns.append(Turn(self.heard, said, reply))
        self.lines += [line for line in (text, reply.text) if line]
        self.over, self.success, self.failure = reply.done or bool(reply.failure), reply.success, reply.failure
        if not self.over:
            self.heard = policy.encode_reply(reply.text, said.tokens, reply.role)

    def tokens(self) -> Tensor:
        """int64 `[L]`, all that the policy has before it when it speaks next."""
        return torch.cat([part for turn in self.turns for part in (turn.heard, turn.said.tokens)] + [self.heard])

    @property
    def spoken(self) -> int:
        """How often the policy spoke."""
        return sum(len(turn.said.tokens) > 0 for turn in self.turns)


class Layout:
    """The turns of `B` dialogues as `T` steps, padded at the end.

    Attributes:
        turns: all `N` of them, dialogue by dialogue.
        mask: bool `[B, T]`; own: bool `[B, T]`, what the policy said.
        tokens, segment: int64 `[B, T]`; the segment is the number of the turn.
        last: int64 `[B]`, each dialogue's last turn among all.
    """

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        self.turns = [turn for dialogue in dialogues for turn in dialogue.turns]
        count = torch.tensor([len(dialogue.turns) for dialogue in dialogues])
        parts = torch.tensor([[len(turn.heard), len(turn.said.tokens)] for turn in self.turns])
        lengths = parts.sum(1)
        row = torch.arange(len(dialogues)).repeat_interleave(count)
        steps = torch.zeros_like(count).index_add(0, row, lengths)
        self._ends, self.last = lengths.cumsum(0) - 1, count.cumsum(0) - 1
        self._own = torch.tensor([False, True]).repeat(len(parts)).repeat_interleave(parts.flatten())
        self.mask = torch.arange(int(steps.max())) < steps[:, None]
        self.own = self._rows(self._own)
        self.tokens = self._rows(torch.cat([part for turn in self.turns for part in (turn.heard, turn.said.tokens)]))
        number = torch.cat([torch.arange(len(dialogue.turns)) for dialogue in dialogues])
        self.segment = self._rows(number.repeat_interleave(lengths))

    def at_ends(self, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """`[B, T]`, a value per turn `[N]` at the turn's last step."""
        flat = torch.full(self._own.shape, elsewhere)
        flat[self._ends] = values
        return self._rows(flat)

    def at_own(self, parts: Sequence[Tensor]) -> Tensor:
        """`[B, T]`, values of the steps of what the policy said, turn by turn; 0 elsewhere."""
        values = torch.cat(list(parts))
        flat = values.new_zeros(self._own.shape)
        flat[self._own] = values
        return self._rows(flat)

    def _rows(self, flat: Tensor) -> Tensor:
        field = flat.new_zeros(self.mask.shape)
        field[self.mask] = flat
        return field


def with_next_step(sequences: Sequence[Tensor], token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences int64 `[L]` with one more step, of which only the state before it counts.

    Returns:
        Tokens int64 `[B, T]`, the mask bool `[B, T]`, and the places int64 `[B]` of the added step.
    """
    added = [torch.cat([sequence, torch.tensor([token])]) for sequence in sequences]
    place = torch.tensor([len(sequence) for sequence in sequences])
    tokens = pad_sequence(added, batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) <= place[:, None], place
