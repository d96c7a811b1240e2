"""Active queries: which pairs to ask a user about, so that the answers tell most of whom one has before one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.models.latent_reward import LatentReward, Pairs
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.preferences import pairs_of, right_pairs
from regimen.tasks.rows import RowReader

Form = Literal["mixture", "released"]
Answer = Callable[[TensorDict, Tensor, Tensor], Tensor]
"""Rows `[B]` of users and pairs `[B, N, L, S]` twice to labels `[B, N]`."""
MOST_LABELLINGS = 10
"""Of at most so many pairs all vectors of labels are enumerated."""


def query_information(mean: Tensor, log_var: Tensor, form: Form = "mixture") -> Tensor:
    """How much the answers to some pairs would tell of the latent, in nats, by the posteriors after each answer; `[C]`.

    All answers count alike. `"mixture"` is the mutual information if the mixture of the posteriors were a Gaussian with
    its moments, `1/2 sum_d [log(mean var_d + Var mean_d) - mean log var_d]`, which is never negative. `"released"` is
    the score of VPL's released code, `log(2 pi mean sum_d var_d) - mean sum_d log(2 pi var_d)`; it ignores the means,
    and compares the logarithm of a sum with a sum of logarithms, so it only ranks.

    Args:
        mean, log_var: `[C, A, Z]`, of `C` sets of pairs with `A` answers each.
        form: see above.

    Raises:
        ValueError: other shapes, or an unknown form.
    """
    if mean.ndim != 3 or mean.shape != log_var.shape or form not in get_args(Form):
        raise ValueError(
            f"query_information: mean {list(mean.shape)}, log_var {list(log_var.shape)}, form '{form}'; expected "
            f"[C, A, Z] twice, and one of {', '.join(get_args(Form))}"
        )
    variance = log_var.exp()
    if form == "released":
        whole = (2 * math.pi * variance.sum(2).mean(1)).log()
        return whole - (math.log(2 * math.pi) + log_var).sum(2).mean(1)
    mixed = (variance.mean(1) + mean.var(1, correction=0)).log()
    return (mixed - log_var.mean(1)).sum(1) / 2


@torch.no_grad()
def select_queries(model: LatentReward, first: Tensor, second: Tensor, form: Form = "mixture") -> int:
    """The set of pairs, of `C` candidates, whose answers would tell most; every vector of answers is tried.

    Args:
        model: infers latents from any number of pairs.
        first, second: `[C, N, L, S]`.
        form: see `query_information`.

    Raises:
        ValueError: more pairs than can be enumerated.
    """
    sets, asked = first.shape[:2]
    if asked > MOST_LABELLINGS:
        raise ValueError(
            f"select_queries: sets of {asked} pairs have 2^{asked} answers; expected at most {MOST_LABELLINGS} pairs. "
            "Ask some of them first"
        )
    answers = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=first.device)] * asked).view(-1, asked)
    labels = answers.expand(sets, -1, -1).flatten(0, 1)
    wide = {name: part.repeat_interleave(len(answers), 0) for name, part in (("first", first), ("second", second))}
    found = model.infer(Pairs.of({**wide, "label": labels}))
    mean, log_var = (part.unflatten(0, (sets, len(answers))) for part in (found.mean, found.log_var))
    return int(query_information(mean, log_var, form).argmax())


class QueryTask:
    """Asks simulated users about the pairs that would tell most of them.

    A sample is a user with the answers, in the step columns of `preference_rows`, to be learned from. The evaluation
    says how well users are known after as many answers, on the pairs of their rows.
    """

    generates = True
    group_size = 1

    def __init__(
        self,
        name: str,
        users: TensorDict,
        answer: Answer,
        candidates: tuple[Tensor, Tensor],
        *,
        asked: Sequence[int] = (1, 2, 4),
        form: Form = "mixture",
        random_sets: int = 40,
        member: str = "reward_model",
    ) -> None:
        """Make a task of users.

        Args:
            name: unique within a regimen.
            users: rows of `preference_rows`, whose pairs are never asked.
            answer: what users say.
            candidates: sets of pairs, `[C, N, L, S]` twice, of which one is asked, the same for all users.
            asked: numbers of questions after which it is evaluated; the largest is how many `collect` asks.
            form: see `query_information`.
            random_sets: of the candidates, how many the evaluation averages over for questions at random.
            member: the `LatentReward` that is to know the users.

        Raises:
            ValueError: more questions than the candidates have, or none.
        """
        if not asked or min(asked) < 1 or max(asked) > candidates[0].shape[1]:
            raise ValueError(
                f"task '{name}': asked={list(asked)}; expected numbers from 1 to {candidates[0].shape[1]}, the pairs "
                "in a candidate"
            )
        self.name, self.users, self.answer, self.candidates = name, users, answer, candidates
        self.asked, self.form, self.random_sets, self.member = tuple(asked), form, random_sets, member
        self._reader = RowReader(len(users), "shuffle", name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The task reads none."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` users, who have answered the set that tells most."""
        users = self.users[self._reader.draw(size, rng)].to(rng.device)
        most = max(self.asked)
        pairs = self._answered(users, self._chosen(cast, most), most)
        return Rollout.create(
            task=self.name,
            group=torch.arange(size, device=rng.device),
            mask=pairs.mask,
            columns=users.exclude("mask", "step_columns"),
            step_columns={"first": pairs.first, "second": pairs.second, "label": pairs.label},
            knobs=knobs,
        )

    def _chosen(self, cast: Mapping[str, Any], count: int, form: Form | None = None) -> int:
        model = cast[self.member]
        first, second = (part[:, :count].to(model.device) for part in self.candidates)
        return select_queries(model, first, second, form or self.form)

    def _answered(self, users: TensorDict, candidate: int, count: int) -> Pairs:
        """What users say of the first pairs of a candidate."""
        device = users["mask"].device
        first, second = (part[candidate, :count].to(device).expand(len(users), -1, -1, -1) for part in self.candidates)
        return Pairs.of({"first": first, "second": second, "label": self.answer(users, first, second)})

    @torch.no_grad()
    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """`<form>_<n>`, accuracy on all users' pairs after the `n` questions that either form chooses; `random_<n>`."""
        found = {}
        for count in self.asked:
            for form in get_args(Form):
                found[f"{form}_{count}"] = self._accuracy(cast, self._chosen(cast, count, form), count)
            tried = [self._accuracy(cast, candidate, count) for candidate in range(self._random())]
            found[f"random_{count}"] = sum(tried) / len(tried)
        return Evaluation(found)

    def _random(self) -> int:
        return min(self.random_sets, len(self.candidates[0]))

    def _accuracy(self, cast: Mapping[str, Any], candidate: int, count: int) -> float:
        model = cast[self.member]
        users = self.users.to(model.device)
        known = model.infer(self._answered(users, candidate, count)).mean
        return float(right_pairs(model, pairs_of(users), known).mean())

    def state_dict(self) -> dict[str, Any]:
        """Users still to come."""
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._reader.load_state_dict(state)
