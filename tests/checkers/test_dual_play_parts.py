"""The parts of dual play pass the checkers, on a rollout of two roles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorStack

from regimen.checkers import check
from regimen.controllers import Phases
from regimen.controllers.phases import Phase
from regimen.credit import PassRateSelector
from regimen.functions.answers import exact_match
from regimen.knobs import Knobs
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.rewards import ChanceReward, PassRate, ProposerReward, QuestionDiversity, QuestionGuard, Scene, judge
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout
from regimen.tasks import DualPlayTask, QuestionReview


def role(name: str, group: list[int], question: list[str], text: list[str], number: list[int]) -> Rollout:
    columns = {
        "question": NonTensorStack(*question),
        "reference": NonTensorStack(*["2"] * len(text)),
        "text": NonTensorStack(*text),
        "question_number": torch.tensor(number),
    }
    steps = torch.rand(len(text), 3)
    return Rollout.create(
        task=name,
        group=torch.tensor(group),
        mask=steps > -1,
        actions=(9 * steps).long(),
        logprobs=-steps,
        columns=columns,
    )


def played() -> Rollout:
    """Two questions, and three answers to each."""
    questions = ["1 + 1", "3 - 1"]
    proposals = role("proposer", [0, 0], questions, ["a", "b"], [0, 1])
    asked = [question for question in questions for _ in range(3)]
    answers = role("solver", [0, 0, 0, 1, 1, 1], asked, ["2", "2", "3", "2", "1", "1"], [0, 0, 0, 1, 1, 1])
    return Rollout.cat([proposals, answers])


correct = AnswerReward(exact_match, expected="reference").on("solver")
rate = PassRate(correct, QuestionGuard())
diversity = QuestionDiversity(rate)
expression = ProposerReward(rate, diversity).on("proposer") + correct


@pytest.mark.parametrize(
    "part",
    [ChanceReward(), QuestionGuard(), rate, diversity, ProposerReward(rate, diversity).on("proposer")],
    ids=lambda part: type(part).__name__,
)
def test_a_reward_passes(part: Any) -> None:
    assert check(part, played()).messages == []


def test_the_selection_passes() -> None:
    whole = expression + 0.0 * rate
    judged, _ = judge(whole, played(), Scene({}, Knobs.of(whole)))
    assert check(PassRateSelector(), judged).messages == []


class Always:
    """Gives the same questions again and again."""

    def draw(self, count: int) -> list[tuple[str, str]]:
        return [("1 + 1", "2")] * count


def cast_of_speakers() -> dict[str, TokenPolicy]:
    words = word_tokenizer(["one", "two", "1", "+", "2"])
    model = small_decoder(len(words), dim=16, layers=1, heads=2)
    return {name: TokenPolicy(model, words, max_new_tokens=4) for name in ("proposer", "solver")}


def test_the_tasks_pass() -> None:
    play = DualPlayTask(
        "play", [{"piece": "one"}, {"piece": "two"}], propose="{piece}", parse=lambda text: ("1 + 1", "2"),
        proposals=2, answers=3, order="sequential",
    )  # fmt: skip
    assert check(play, cast=cast_of_speakers()).messages == []
    assert check(QuestionReview("solver", Always(), answers=2), cast=cast_of_speakers()).messages == []


def test_the_phases_pass() -> None:
    shares = [{"mixture/a": 1.0, "mixture/b": 0.0}, {"mixture/a": 0.0, "mixture/b": 1.0}]
    phases = Phases([Phase(share, name, 2, 4) for share, name in zip(shares, ("proposer", "solver"), strict=True)])
    assert check(phases, metrics={"proposer/steps": 1.0, "solver/steps": 0.0}).messages == []
