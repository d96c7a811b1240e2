"""Dialogues: a language policy speaks and is answered, several times, in one sequence of tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.partners import DialogueEnv, Reply, checked, failed
from regimen.tasks.rows import Order, RowReader
from regimen.tasks.transcripts import Dialogue, Layout, Said, with_next_step

if TYPE_CHECKING:
    from regimen.policies.token import TokenPolicy

FRESH = 2**62
"""Starts and seeds are drawn below this."""


class DialogueTask:
    """Dialogues of a `TokenPolicy` with an environment, `group_size` from each start.

    A sample is one dialogue: the opening, the policy's turn, the reply to it, the policy's next turn, and so on to the
    policy's last. What the policy said stays as the tokens that it sampled; what it heard is tokenized in pieces, with
    the chat template's words around it if the policy chats. A turn ends with the end-of-text token or a stop text,
    which are the policy's own, or is cut off after `max_new_tokens`; the dialogue then goes on all the same.

    Fields: `loss_mask` the policy's own tokens, `segment` the number of the turn (a turn is what the policy hears and
    what it says to it), `discount` 1 within a turn, at a turn's last token that of the task, or 0 if the dialogue ended
    there. Columns: `env_reward [B, T]`, at the last token of the turn that earned it, and so the `facts`; `text` (the
    transcript), `turns`, `success`, `start_id`; `truncated`, whether it was cut off at `max_turns` or for want of room;
    `failure`, why the environment could not go on. A failed dialogue is not learned from (`loss_mask` False).

    With a `critic`, `bootstrap [B]` is what it makes of the state in which a dialogue was cut off, for `GAE`; without
    one, nothing of value lies behind the cut.
    """

    generates = True

    def __init__(
        self,
        name: str,
        env: DialogueEnv,
        *,
        max_turns: int = 8,
        max_tokens: int | None = None,
        discount: float | Knob = 1.0,
        group_size: int = 1,
        starts: Sequence[int] | None = None,
        order: Order = "shuffle",
        evaluation: Sequence[int] = range(64),
        facts: Sequence[str] = (),
        critic: str | None = None,
        reads: str | None = None,
        member: str = "policy",
        evaluated: str | None = None,
    ) -> None:
        """Make a task of an environment.

        Args:
            name: unique within a regimen.
            env: the other side, see `OneByOne`.
            max_turns: turns of the policy.
            max_tokens: longest sequence; as much as the model has room for if `None`.
            discount: from a turn to the next: the default of a knob `discount`, or a knob.
            group_size: dialogues from one start, which share their `group`.
            starts: those to train on; a fresh number for every group if `None`.
            order: how `starts` are drawn, see `RowReader`.
            evaluation: the starts of the evaluation; none of `starts` may be among them.
            facts: of the replies, to become columns `[B, T]`; 0 where a reply does not have one.
            critic, reads: members that value the state in which a dialogue was cut off, as in `GAE`.
            member: the cast member that speaks.
            evaluated: the member that is evaluated; `member` by default.

        Raises:
            ValueError: a number is out of range, or starts are both trained on and held out.
        """
        if min(group_size, max_turns) < 1:
            raise ValueError(f"task '{name}': group_size={group_size}, max_turns={max_turns}; expected at least 1")
        if both := sorted(set(starts or ()) & set(evaluation)):
            raise ValueError(
                f"task '{name}': {len(both)} starts are trained on and held out (first {both[0]}); give other starts "
                "with evaluation=[...], or none"
            )
        self.name, self.env, self.group_size = name, env, group_size
        self.max_turns, self.max_tokens = max_turns, max_tokens
        self.discount = discount if isinstance(discount, Knob) else Knob("discount", discount, 0.0, 1.0)
        self.evaluation, self.facts = evaluation, tuple(facts)
        self.critic, self.reads, self.member, self.evaluated = critic, reads, member, evaluated or member
        self.starts = starts
        self._reader = None if starts is None else RowReader(len(starts), order, name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount."""
        return (self.discount,)

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size // group_size` starts, with `group_size` dialogues from each.

        Raises:
            ValueError: `size` is not a multiple of `group_size`, or the critic is not in the cast.
        """
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples, expected a multiple of its group_size "
                f"{self.group_size}"
            )
        started, policy = time.time(), cast[self.member]
        drawn = [start for start in self._draw(size // self.group_size, rng) for _ in range(self.group_size)]
        dialogues = self._hold(policy, drawn, knobs, rng)
        rollout = self._rollout(policy, dialogues, knobs)
        if self.critic is not None:
            rollout = rollout.with_columns(bootstrap=self._values_behind(self.critic, cast, dialogues, rollout))
        clock = {"started_at": started, "finished_at": time.time()}
        return rollout.replace(
            group=torch.arange(size, device=policy.device) // self.group_size,
            **{name: torch.full((size,), at, dtype=torch.float64, device=policy.device) for name, at in clock.items()},
        )

    def play(
        self, policy: TokenPolicy, starts: Sequence[int], knobs: Mapping[str, float], rng: torch.Generator
    ) -> Rollout:
        """One dialogue from each start, in their order."""
        return self._rollout(policy, self._hold(policy, starts, knobs, rng), knobs)

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Means over the evaluation's starts: `return` (not discounted), `success`, `turns` and `truncated`.

        They leave out the dialogues that failed, of which `failed` is the share (smaller is better, as of `truncated`).
        """
        if not len(self.evaluation):
            return Evaluation({})
        rollout = self.play(cast[self.evaluated], self.evaluation, knobs, rng)
        whole = rollout.loss_mask.any(1)
        metrics = {"failed": float((~whole).float().mean())}
        if bool(whole.any()):
            measures = {"return": rollout["env_reward"].sum(1)}
            measures |= {name: rollout[name] for name in ("success", "turns", "truncated")}
            metrics |= {name: float(value[whole].double().mean()) for name, value in measures.items()}
        return Evaluation(metrics, {"dialogues": list(rollout["text"].tolist())[:8]})

    def state_dict(self) -> dict[str, Any]:
        """Starts still to come in this epoch."""
        return {} if self._reader is None else self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self._reader is not None:
            self._reader.load_state_dict(state)

    def _draw(self, count: int, rng: torch.Generator) -> list[int]:
        if self._reader is None or self.starts is None:
            return torch.randint(FRESH, (count,), generator=rng, device=rng.device).tolist()
        return [self.starts[row] for row in self._reader.draw(count, rng).tolist()]

    def _hold(
        self, policy: TokenPolicy, starts: Sequence[int], knobs: Mapping[str, float], rng: torch.Generator
    ) -> list[Dialogue]:
        """Dialogues from their openings to their ends; each turn is sampled for all that are not over."""
        if policy.processor is not None:
            raise ValueError(
                f"task '{self.name}': a policy that reads images cannot hold a dialogue; leave its processor"
            )
        seeds = torch.randint(FRESH, (len(starts),), generator=rng, device=rng.device).tolist()
        openings, state = self._reset(starts, seeds)
        room = self._limit(policy) - int(knobs["max_new_tokens"])
        dialogues = [Dialogue.begun(start, reply, policy, room) for start, reply in zip(starts, openings, strict=True)]
        for _ in range(self.max_turns):
            before = {row: dialogue.tokens() for row, dialogue in enumerate(dialogues) if not dialogue.over}
            before = {row: tokens for row, tokens in before.items() if len(tokens) <= room}
            if not before:
                break
            said = Said.of(policy.complete(list(before.values()), knobs, rng))
            texts = policy.decode([turn.tokens for turn in said])
            replies = self._step(state, list(before), texts)
            for row, tokens, text, reply in zip(before, said, texts, replies, strict=True):
                dialogues[row].take(tokens, text, reply, policy)
        return dialogues

    def _limit(self, policy: TokenPolicy) -> int:
        return min(limit for limit in (self.max_tokens, policy.longest, FRESH) if limit is not None)

    def _reset(self, starts: Sequence[int], seeds: Sequence[int]) -> tuple[list[Reply], Any]:
        try:
            openings, state = self.env.reset(starts, seeds)
        except Exception as error:
            return [failed("the environment's reset", error)] * len(starts), None
        return self._complete(openings, len(starts)), state

    def _step(self, state: Any, rows: Sequence[int], texts: Sequence[str]) -> list[Reply]:
        try:
            replies = self.env.step(state, rows, texts)
        except Exception as error:
            return [failed("the environment's step", error)] * len(rows)
        return self._complete(replies, len(rows))

    def _complete(self, replies: Sequence[Reply], count: int) -> list[Reply]:
        if len(replies) != count:
            raise ValueError(
                f"task '{self.name}': the environment gave {len(replies)} replies for {count} dialogues; expected one "
                "for each row that it was given"
            )
        return [checked(reply) for reply in replies]

    def _rollout(self, policy: TokenPolicy, dialogues: Sequence[Dialogue], knobs: Mapping[str, float]) -> Rollout:
        steps = Layout(dialogues)
        sound = torch.tensor([not dialogue.failure for dialogue in dialogues])
        scored = knobs["temperature"] > 0
        return Rollout.create(
            task=self.name,
            group=torch.arange(len(dialogues)),
            context={"prompt": [dialogue.lines[0] for dialogue in dialogues]},
            knobs=knobs,
            mask=steps.mask,
            loss_mask=steps.own & sound[:, None],
            actions=steps.tokens,
            segment=steps.segment,
            discount=self._discounts(steps, dialogues, knobs),
            version=torch.full((len(dialogues),), policy.version),
            columns=_outcomes(dialogues),
            step_columns=self._replies(steps) | (_supports(steps) if scored else {}),
            **({"logprobs": steps.at_own([turn.said.logprobs for turn in steps.turns])} if scored else {}),
        ).to(policy.device)

    def _discounts(self, steps: Layout, dialogues: Sequence[Dialogue], knobs: Mapping[str, float]) -> Tensor:
        """`[B, T]`: 1 within a turn, the task's between two, 0 where a dialogue ended."""
        onward = torch.full((len(steps.turns),), knobs[self.discount.name])
        onward[steps.last[torch.tensor([dialogue.over for dialogue in dialogues])]] = 0
        return steps.at_ends(onward, elsewhere=1.0)

    def _replies(self, steps: Layout) -> dict[str, Tensor]:
        """What the replies brought, `[B, T]`, at the ends of their turns."""
        replies = [turn.reply for turn in steps.turns]
        values = {"env_reward": [float(reply.reward) for reply in replies]}
        values |= {name: [float(reply.facts.get(name, 0)) for reply in replies] for name in self.facts}
        return {name: steps.at_ends(torch.tensor(column)) for name, column in values.items()}

    @torch.no_grad()
    def _values_behind(
        self, critic: str, cast: Mapping[str, Any], dialogues: Sequence[Dialogue], rollout: Rollout
    ) -> Tensor:
        """`[B]`, the critic's value of the state after a dialogue that was cut off, the last reply read; else 0."""
        if critic not in cast:
            raise ValueError(
                f"task '{self.name}': the cast has no critic '{critic}' (it has: {', '.join(cast)}); add it, or "
                "leave critic=None, and nothing of value lies behind a cut"
            )
        values = torch.zeros(len(dialogues), device=rollout.mask.device)
        cut = rollout["truncated"].nonzero().squeeze(-1)
        if len(cut) == 0:
            return values
        policy = cast[self.member]
        seen = [dialogues[row].tokens()[: self._limit(policy) - 1] for row in cut.tolist()]
        tokens, mask, place = (x.to(values.device) for x in with_next_step(seen, policy.tokenizer.eos_token_id))
        after = Rollout.create(
            task=self.name,
            group=rollout.group[cut],
            context=rollout.context[cut],
            mask=mask,
            loss_mask=torch.zeros_like(mask).scatter(1, place[:, None], True),
            actions=tokens,
        ).replace(knobs=rollout.knobs[cut])
        source = after if self.reads is None else cast[self.reads].distribution(after, after.mask).hidden
        values[cut] = cast[critic](source)[torch.arange(len(cut)), place]
        return values


def _outcomes(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """What became of each dialogue."""
    return {
        "text": ["\n".join(dialogue.lines) for dialogue in dialogues],
        "failure": [dialogue.failure for dialogue in dialogues],
        "success": torch.tensor([dialogue.success for dialogue in dialogues]),
        "truncated": torch.tensor([not dialogue.over for dialogue in dialogues]),
        "turns": torch.tensor([dialogue.spoken for dialogue in dialogues]),
        "start_id": torch.tensor([dialogue.start for dialogue in dialogues]),
    }


def _supports(steps: Layout) -> dict[str, Tensor]:
    """Sizes of the supports that the tokens were sampled from, if the sampler was truncated."""
    kept = [turn.said.kept for turn in steps.turns if turn.said.kept is not None]
    return {"kept": steps.at_own(kept)} if kept else {}
