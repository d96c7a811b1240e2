"""Which questions tell most of a user: the score by hand, the choice, and a task that asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers import check
from regimen.models.latent_reward import LatentReward, Latents, PairEncoder, Pairs
from regimen.tasks import QueryTask, query_information, select_queries
from regimen.tasks.preferences import preference_rows

VARIANCE = torch.tensor([[[0.4, 0.9], [0.6, 0.1]]])
MEAN = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])


class Sign(nn.Module):
    """Two kinds of users, who want large numbers, or small ones; a pair of equal numbers tells nothing."""

    latent = 1

    def forward(self, pairs: Pairs) -> Latents:
        first, second = pairs.first[:, :, 0, 0], pairs.second[:, :, 0, 0]
        evidence = ((2 * pairs.label - 1) * (first - second) * pairs.mask).sum(1, keepdim=True)
        return Latents(evidence.tanh(), torch.full_like(evidence, -1.0))


class Wants(LatentReward):
    """The reward of such users: the number, or minus the number."""

    def __init__(self) -> None:
        super().__init__(1, Sign(), (4,))

    def score(self, states: Tensor, latents: Tensor) -> Tensor:
        return states[..., 0] * latents.view(len(latents), *[1] * (states.ndim - 2))


def answer(users: TensorDict, first: Tensor, second: Tensor) -> Tensor:
    larger = (first > second)[:, :, 0, 0]
    return (larger == (users["user"][:, None] == 1)).float()


def candidates(sets: int = 6, pairs: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    first = torch.randn(sets, pairs, 1, 1, generator=rng)
    return first, first.clone()


def people(count: int = 40) -> TensorDict:
    rng = torch.Generator().manual_seed(1)
    first, second = (torch.randn(count, 5, 1, 1, generator=rng) for _ in range(2))
    user = torch.arange(count) % 2
    return preference_rows(first, second, answer(TensorDict({"user": user}, [count]), first, second), user=user)


def task(**options: Any) -> QueryTask:
    first, second = candidates()
    second[4] = first[4] - 2  # Of six sets of equal numbers only this one tells anything.
    settings: dict[str, Any] = {"asked": (1, 2)}
    return QueryTask("ask", people(), answer, (first, second), **{**settings, **options})


# The score


def test_the_score_has_the_worked_values() -> None:
    assert float(query_information(MEAN, VARIANCE.log(), "released")) == pytest.approx(0.079654, abs=1e-6)
    assert float(query_information(MEAN, VARIANCE.log())) == pytest.approx(0.814925, abs=1e-6)


def test_answers_that_change_nothing_tell_nothing() -> None:
    mean, log_var = MEAN[:, :1].expand(1, 4, 2), VARIANCE[:, :1].log().expand(1, 4, 2)
    assert float(query_information(mean, log_var)) == pytest.approx(0, abs=1e-6)


def test_the_mixture_form_is_never_negative() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, log_var = (torch.randn(500, 4, 3, generator=rng) for _ in range(2))
    assert float(query_information(mean, log_var).min()) >= 0


# The choice


@pytest.mark.parametrize("asked", [1, 3])
def test_the_set_that_tells_users_apart_is_chosen(asked: int) -> None:
    first, second = candidates()
    second[4] = first[4] - 2
    assert select_queries(Wants(), first[:, :asked], second[:, :asked]) == 4


def test_the_labels_of_all_answers_are_tried() -> None:
    seen: list[Pairs] = []

    class Listening(Sign):
        def forward(self, pairs: Pairs) -> Latents:
            seen.append(pairs)
            return super().forward(pairs)

    select_queries(LatentReward(1, Listening(), (4,)), *candidates(sets=2))
    labels = seen[0].label.view(2, 8, 3)
    assert len({tuple(row) for row in labels[1].tolist()}) == 8
    assert torch.equal(seen[0].first[8:], candidates(sets=2)[0][1:].expand(8, -1, -1, -1))


def test_more_questions_than_can_be_tried_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sets of 11 pairs have 2\^11 answers; expected at most 10"):
        select_queries(Wants(), torch.zeros(2, 11, 1, 1), torch.zeros(2, 11, 1, 1))
    with pytest.raises(ValueError, match="form 'other'"):
        query_information(MEAN, MEAN, "other")  # type: ignore[arg-type]


# The task


def test_chosen_questions_tell_more_than_random_ones() -> None:
    found = task().evaluate({"reward_model": Wants()}, {}, torch.Generator()).metrics
    assert found["mixture_1"] == found["mixture_2"] == 1
    assert 0.4 < found["random_1"] < 0.8
    assert set(found) == {f"{form}_{n}" for form in ("mixture", "released", "random") for n in (1, 2)}


def test_users_are_collected_with_their_answers() -> None:
    rollout = task().collect({"reward_model": Wants()}, {}, torch.Generator().manual_seed(0), 7)
    assert rollout["first"].shape == (7, 2, 1, 1)
    assert torch.equal(rollout["first"][0], candidates()[0][4, :2])
    assert torch.equal(rollout["label"], (rollout["user"] == 1).float()[:, None].expand(-1, 2))


def test_the_checker_finds_nothing() -> None:
    torch.manual_seed(0)
    cast = {"reward_model": LatentReward(1, PairEncoder(1, 2, (4,)), (4,))}
    part = task()
    assert check(part, cast=cast).messages == []


def test_more_questions_than_a_candidate_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asked=\[1, 4\]; expected numbers from 1 to 3"):
        task(asked=(1, 4))
