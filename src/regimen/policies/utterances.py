"""Two levels of one dialogue: steps that are whole utterances, and the tokens within them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from regimen.knobs import Knob
from regimen.policies.base import acted_anew
from regimen.policies.token import TokenPolicy
from regimen.policies.token_steps import TokenSteps
from regimen.rollout import Rollout, Steps

# Columns of tokens that mean nothing summed over an utterance.
_OF_TOKENS = ("kept", "visible", "positions")
_PER_SAMPLE = ("version", "started_at", "finished_at")


def utterance_steps(rollout: Rollout, context: int, utterance: int) -> Rollout:
    """A dialogue's turns as its steps: the `U` turns of token rows `[B, T]`, as a `DialogueTask` collects them.

    - `observations`: the last `context` tokens of all that came before the policy spoke, a table of `tokens` int64
      `[B, U, context]` and `mask` bool; the column `next_observations` is the same after the other side's reply.
    - `actions`: what the policy said, a table of `tokens [B, U, utterance]` and `mask`.
    - An utterance's log-probability is the sum of its tokens' (which stay as the column `token_logprobs`), its discount
      the product of its turn's; a reward per step and numbers in columns per step (`env_reward`, facts) are summed.

    Args:
        rollout: with the field `segment`, the number of the turn.
        context, utterance: tokens that are kept of each; the newest ones of a context.

    Raises:
        ValueError: there are no segments, an utterance is longer, the sampler truncated its supports, or a dialogue was
            cut off where it might have gone on, so that nobody knows what would have come next.
    """
    if rollout.segment is None or min(context, utterance) < 1 or "kept" in rollout.step_columns.keys():  # noqa: SIM118
        raise ValueError(
            f"utterance_steps: context={context}, utterance={utterance}, segments: {rollout.segment is not None}, "
            f"truncated supports: {rollout.get('kept') is not None}; expected at least 1 of each, samples of a "
            "DialogueTask, and no top_k or top_p"
        )
    turns = _Turns.of(rollout)
    if int(turns.said.max()) > utterance:
        raise ValueError(
            f"utterance_steps: an utterance has {int(turns.said.max())} tokens, expected at most {utterance}; give "
            "utterances more room, or lower the knob max_new_tokens"
        )
    seen = turns.cut((turns.first - context).clamp(min=0), turns.first.clamp(max=context), context)
    summed = {name: turns.sum(value) for name, value in rollout.step_columns.items() if name not in _OF_TOKENS}
    fields: dict[str, Any] = {"discount": turns.onward(rollout.discount)}
    if rollout.logprobs is not None:
        fields["logprobs"] = turns.sum(torch.where(rollout.loss_mask, rollout.logprobs, 0))
        summed["token_logprobs"] = turns.taken(rollout.logprobs, turns.first, utterance)
    if rollout.reward is not None:
        fields["reward"] = rollout.reward if rollout.reward.ndim == 1 else turns.sum(rollout.reward)
    fields |= {name: value for name in _PER_SAMPLE if (value := getattr(rollout, name)) is not None}
    made = Rollout.create(
        task="dialogue",
        group=rollout.group,
        mask=turns.spoken | (torch.arange(turns.said.shape[1], device=turns.said.device) == 0),
        loss_mask=turns.spoken,
        context=rollout.context,
        observations=seen,
        actions=turns.cut(turns.first, turns.said, utterance),
        columns=rollout.columns,
        step_columns={**summed, "next_observations": turns.following(seen)},
        **fields,
    )
    return Rollout(made.data, rollout.task_names).replace(task=rollout.task, knobs=rollout.knobs)


@dataclass(frozen=True)
class _Turns:
    """Where in its row each turn's utterance stands.

    Attributes:
        rollout: the token rows.
        first, said: int64 `[B, U]`, place of an utterance's first token, and how many it has, 0 where there is none.
    """

    rollout: Rollout
    first: Tensor
    said: Tensor

    @classmethod
    def of(cls, rollout: Rollout) -> _Turns:
        own, segment = rollout.loss_mask, rollout.segment
        count = int(torch.where(own, segment, 0).max()) + 1
        place = torch.arange(rollout.steps, device=own.device).expand(own.shape)
        blank = place.new_zeros(len(rollout), count)
        within = torch.where(own, segment, 0)
        said = blank.scatter_add(1, within, own.long())
        first = (blank + rollout.steps).scatter_reduce(1, within, torch.where(own, place, rollout.steps), "amin")
        return cls(rollout, torch.where(said > 0, first, 0), said)

    @property
    def spoken(self) -> Tensor:
        """Bool `[B, U]`."""
        return self.said > 0

    def taken(self, values: Tensor, start: Tensor, width: int) -> Tensor:
        """`[B, U, width]`: values `[B, T]` from some places `[B, U]` on."""
        place = start[..., None] + torch.arange(width, device=start.device)
        flat = place.flatten(1).clamp(max=self.rollout.steps - 1)
        return values.gather(1, flat).view(place.shape)

    def cut(self, start: Tensor, length: Tensor, width: int) -> TensorDict:
        """Tokens from some places on, as texts of some lengths `[B, U]` in a table `[B, U]`."""
        mask = torch.arange(width, device=start.device) < length[..., None]
        tokens = torch.where(mask, self.taken(self.rollout.actions, start, width), 0)
        return TensorDict({"tokens": tokens, "mask": mask}, mask.shape[:2], device=start.device)

    def following(self, seen: TensorDict) -> TensorDict:
        """What was seen before the next utterance; after the last one, where nothing comes, the same again."""
        goes_on = pad(self.spoken[:, 1:], (0, 1))[..., None]
        later = {name: torch.where(goes_on, value.roll(-1, 1), value) for name, value in seen.items()}
        return TensorDict(later, seen.batch_size, device=seen.device)

    def sum(self, values: Tensor) -> Tensor:
        """`[B, U]`, over the steps of each turn that was spoken."""
        real = torch.where(self.rollout.mask, values, 0)
        room = real.new_zeros(len(real), max(int(self.rollout.segment.max()) + 1, self.said.shape[1]))
        whole = room.scatter_add(1, self.rollout.segment, real)[:, : self.said.shape[1]]
        return torch.where(self.spoken, whole, 0)

    def onward(self, discount: Tensor) -> Tensor:
        """`[B, U]`, the product of a turn's discounts; `ValueError` if a last one is not 0."""
        real = torch.where(self.rollout.mask, discount, 1)
        room = real.new_ones(len(real), max(int(self.rollout.segment.max()) + 1, self.said.shape[1]))
        whole = room.scatter_reduce(1, self.rollout.segment, real, "prod")[:, : self.said.shape[1]]
        open_ = self.spoken & ~pad(self.spoken[:, 1:], (0, 1)) & (whole != 0)
        if bool(open_.any()):
            row, turn = open_.nonzero()[0].tolist()
            raise ValueError(
                f"utterance_steps: dialogue {row} was cut off after turn {turn} and might have gone on (discount "
                f"{float(whole[row, turn]):g}), and what would have come next is not known; let the other side end it "
                "there (Reply(done=True)), or raise max_turns"
            )
        return whole


def as_token_steps(rollout: Rollout, where: Tensor | None = None) -> Rollout:
    """Utterances as the tokens that they are made of: a sample for each of the `R` steps `where` (bool `[B, T]`).

    A row is what was seen and what was said, `loss_mask` the latter; an utterance's advantage is that of all its
    tokens. With `ReinforceObjective(aggregate="constant", horizon=1)` the loss is the mean over utterances of the sum
    over their tokens.

    Args:
        rollout: as `utterance_steps` makes them.
        where: `loss_mask` by default.
    """
    steps = Steps(rollout.loss_mask if where is None else where)
    seen, said = steps.of(rollout.observations), steps.of(rollout.actions)
    there = torch.cat([seen["mask"], said["mask"]], 1)
    length = there.sum(1)
    width = int(length.max()) if len(length) else 1
    # What is there moves to the front, in its order.
    order = (~there).long().argsort(dim=1, stable=True)[:, :width]

    def laid(before: Tensor, own: Tensor) -> Tensor:
        return torch.cat([before, own], 1).gather(1, order)

    mask = torch.arange(width, device=length.device) < length[:, None]
    own = mask & laid(torch.zeros_like(seen["mask"]), said["mask"])
    fields: dict[str, Any] = {}
    if rollout.logprobs is not None:
        kept = rollout.get("token_logprobs")
        spread = torch.where(said["mask"], torch.nan, 0.0) if kept is None else steps.of(kept)
        fields["logprobs"] = torch.where(own, laid(torch.zeros_like(seen["mask"], dtype=spread.dtype), spread), 0)
    if rollout.advantages is not None:
        fields["advantages"] = torch.where(own, steps.of(rollout.advantages)[:, None], 0)
    made = Rollout.create(
        task="utterance",
        group=torch.arange(len(length), device=length.device),
        mask=mask,
        loss_mask=own,
        actions=torch.where(mask, laid(seen["tokens"], said["tokens"]), 0),
        **fields,
    )
    return Rollout(made.data, rollout.task_names).replace(task=rollout.task[steps.row], knobs=rollout.knobs[steps.row])


@dataclass(frozen=True)
class UtteranceSteps:
    """The distribution over the utterance of every recorded step (a `StepDistribution`).

    Attributes:
        steps: the `R` steps that are described.
        tokens: the distribution over their tokens, a sample for each.
    """

    steps: Steps
    tokens: TokenSteps

    @cached_property
    def logprob(self) -> Tensor:
        """`[B, T]`, of the utterances: the sum over their tokens."""
        return self.steps.spread(self.tokens.logprob.sum(1))

    def entropy(self) -> Tensor:
        """`[B, T]`, in nats: the sum of the tokens' entropies along what was said, an estimate of the utterance's."""
        return self.steps.spread(self.tokens.entropy().sum(1))

    def kl(self, other: UtteranceSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`: the sum of the tokens' divergences along what was said, an estimate of the utterances'."""
        return self.steps.spread(self.tokens.kl(other.tokens, estimator).sum(1))


class UtterancePolicy:
    """A `TokenPolicy` as a policy whose actions are whole utterances: the upper of two levels.

    It scores the steps that `utterance_steps` makes, and says something new in their places (`resample`). It holds no
    weights of its own: an update trains the member that is the token policy, an objective asks this one.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.knobs: tuple[Knob, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return self.policy.device

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> UtteranceSteps:
        """The distribution of utterances at the steps `where` (bool `[B, T]`, default `loss_mask`)."""
        steps = Steps(rollout.loss_mask if where is None else where & rollout.loss_mask)
        return UtteranceSteps(steps, self.policy.distribution(as_token_steps(rollout, steps.where)))

    def logprob(self, rollout: Rollout) -> Tensor:
        """Differentiable log-probability `[B, T]` of the recorded utterances."""
        return self.distribution(rollout).logprob

    @torch.no_grad()
    def resample(self, rollout: Rollout, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """The same contexts with utterances said now where they are learned from; see `Batch.resampled`.

        Raises:
            ValueError: the sampler would take the likeliest tokens, or truncate its supports.
        """
        if knobs["temperature"] <= 0 or knobs["top_k"] > 0 or knobs["top_p"] < 1:
            shown = ", ".join(f"{name} = {knobs[name]:g}" for name in ("temperature", "top_k", "top_p"))
            raise ValueError(f"UtterancePolicy.resample: knobs {shown}; expected above 0, 0 and 1")
        steps = Steps(rollout.loss_mask)
        seen, room = steps.of(rollout.observations), rollout.actions["tokens"].shape[-1]
        starts = [tokens[mask] for tokens, mask in zip(seen["tokens"], seen["mask"], strict=True)]
        said = self.policy.complete(starts, {**knobs, "max_new_tokens": room}, rng)
        logprobs = torch.where(said.mask, said.logprobs, 0)
        added = (0, room - said.mask.shape[1])
        texts = {"tokens": pad(torch.where(said.mask, said.tokens, 0), added), "mask": pad(said.mask, added)}
        actions = TensorDict({n: steps.spread(v) for n, v in texts.items()}, rollout.mask.shape, device=seen.device)
        fresh = acted_anew(rollout, actions, steps.spread(logprobs.sum(1)), knobs)
        return fresh.with_step_columns(token_logprobs=steps.spread(pad(logprobs, added)))
