"""Dual play: samples of two roles in one rollout, steps that both take or none, and kept questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen import Cast, Regimen, Stage, Update
from regimen.credit import GroupRelativeAdvantage, PassRateSelector
from regimen.functions.answers import exact_match, tag_text
from regimen.iteration import Counters, StageRun
from regimen.knobs import Knob
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies.token import TokenPolicy
from regimen.rewards import FunctionReward, PassRate, ProposerReward, QuestionDiversity, QuestionGuard, Scene
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout
from regimen.tasks import DualPlayTask, Evaluation, QuestionReview
from regimen.update import Epochs

PIECES = [{"piece": "one"}, {"piece": "two"}]
WORDS = ("one", "two", "ask", "solve", "yes", "no")


@dataclass
class Speaker:
    """A policy that says what it is given to say, in order."""

    lines: list[str]
    heard: list[str] = field(default_factory=list)
    knobs: tuple[Knob, ...] = ()

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        prompts = contexts["prompt"].tolist()
        said = [self.lines[(len(self.heard) + place) % len(self.lines)] for place in range(len(prompts))]
        self.heard += prompts
        mask = torch.ones(len(prompts), 1, dtype=torch.bool)
        columns = {"text": NonTensorStack(*said)}
        return Rollout.create(
            task="policy", group=torch.arange(len(prompts)), mask=mask, context=contexts, columns=columns, knobs=knobs
        )


def parse(text: str) -> tuple[str, str] | None:
    question, answer = tag_text(text, "problem"), tag_text(text, "answer")
    return (question, answer) if question and answer else None


def task(**settings: Any) -> DualPlayTask:
    given = {"propose": "ask {piece}", "solve": "solve {question}", "parse": parse, "order": "sequential"}
    return DualPlayTask("play", PIECES, **{**given, "proposals": 2, "answers": 3, **settings})


def played(lines: list[str], answers: list[str], size: int = 8) -> tuple[Rollout, Speaker, Speaker]:
    cast = {"proposer": Speaker(lines), "solver": Speaker(answers)}
    return task().collect(cast, {}, torch.Generator(), size), cast["proposer"], cast["solver"]


SAID = ["<problem> 1 + 1 </problem> <answer> 2 </answer>", "nonsense"]


def test_a_rollout_holds_the_proposals_and_the_answers_to_each() -> None:
    rollout, proposer, solver = played(SAID, ["2", "3", "2"])
    assert rollout.task_counts() == {"proposer": 2, "solver": 6}
    assert proposer.heard == ["ask one", "ask one"]
    assert solver.heard == ["solve 1 + 1"] * 3 + ["solve "] * 3
    assert rollout["question"].tolist() == ["1 + 1", "", *["1 + 1"] * 3, *[""] * 3]
    assert rollout["reference"].tolist() == ["2", "", *["2"] * 3, *[""] * 3]
    assert rollout["question_number"].tolist() == [0, 1, 0, 0, 0, 1, 1, 1]


def test_groups_are_the_questions_about_a_piece_and_the_answers_to_a_question() -> None:
    rollout, _, _ = played(SAID, ["2"], size=16)
    assert rollout.group.unique(return_counts=True)[1].tolist() == [2, 2, 3, 3, 3, 3]
    assert rollout.of_task("proposer").context["prompt"].tolist() == ["ask one", "ask one", "ask two", "ask two"]


def test_an_unparsable_proposal_has_pass_rate_0_and_raises_nothing() -> None:
    rollout, _, _ = played(SAID, ["2", "3", "2", "", "", ""])
    correct = AnswerReward(exact_match, expected="reference").on("solver")
    rate = PassRate(correct, QuestionGuard(["missing"])).score(rollout, Scene())
    torch.testing.assert_close(rate, torch.tensor([2 / 3, 0, *[2 / 3] * 3, 0, 0, 0]))


def test_bad_settings_are_named() -> None:
    for settings in ({"proposals": 1}, {"answers": 1}):
        with pytest.raises(ValueError, match="task 'play': proposals=.*expected at least 2 of each"):
            task(**settings)
    with pytest.raises(ValueError, match=r"asked for 9 samples, expected a multiple of its group_size 8, 2 proposals"):
        task().collect({}, {}, torch.Generator(), 9)
    with pytest.raises(ValueError, match="task 'play', solve: the template names '{text}'"):
        task(solve="{text}")
    with pytest.raises(ValueError, match="task 'play', propose: the template names '{text}'"):
        task(propose="{text}")


def test_the_evaluation_is_of_the_cast() -> None:
    def measure(cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        return Evaluation({"members": float(len(cast))})

    assert task(evaluate=measure).evaluate({"proposer": 1, "solver": 2}, {}, torch.Generator()).metrics == {
        "members": 2
    }
    assert task().evaluate({}, {}, torch.Generator()).metrics == {}


def test_pieces_go_on_from_a_checkpoint() -> None:
    first, second = task(order="shuffle"), task(order="shuffle")
    cast = {"proposer": Speaker(SAID), "solver": Speaker(["2"])}
    first.collect(cast, {}, torch.Generator().manual_seed(1), 8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    prompts = [
        each.collect(cast, {}, torch.Generator().manual_seed(2), 8).context["prompt"].tolist()[0]
        for each in (first, second)
    ]
    assert prompts[0] == prompts[1]


# Both learn, or none


def policy(seed: int) -> TokenPolicy:
    tokenizer = word_tokenizer(WORDS)
    return TokenPolicy(small_decoder(len(tokenizer), dim=16, layers=1, seed=seed), tokenizer, max_new_tokens=3)


class Game:
    """Two small decoders, whose answers are judged as `right` says; `run` is a stage at work."""

    def __init__(self, *roles: str) -> None:
        self.right: Any = lambda rollout: torch.arange(len(rollout)) % 3 == 0
        self.cast = Cast(proposer=policy(0), solver=policy(1))
        correct = FunctionReward(lambda rollout: self.right(rollout).float(), "correct").on("solver")
        rate = PassRate(correct)
        diversity = QuestionDiversity(rate)
        self.stage = Stage(
            "play",
            [task(parse=lambda text: (text, "yes"))],
            10,
            16,
            correct + ProposerReward(rate, diversity) + rate.logged(),
            PassRateSelector(GroupRelativeAdvantage(), of=["solver"]),
            [
                Update(
                    ClippedSurrogateObjective(aggregate="constant", horizon=3, member=role),
                    [role],
                    1e-2,
                    batches=Epochs(tasks=[role]),
                )
                for role in roles
            ],
        )
        self.run = StageRun(Regimen(self.cast, [self.stage], evaluations=[]), self.stage)
        self.run.start(fresh=True)
        self.rng = torch.Generator().manual_seed(0)

    def iterate(self) -> dict[str, float]:
        return self.run.iterate(0, Counters(), self.rng)

    def state(self) -> list[Tensor]:
        """Weights and the optimisers' averages."""
        found = [value.clone() for role in ("proposer", "solver") for value in self.cast[role].state_dict().values()]
        for learner in self.run.learners:
            for moments in learner.state_dict()["state"].values():
                found += [value.clone() for value in moments.values() if isinstance(value, Tensor)]
        return found


def unequal(rollout: Rollout) -> Tensor:
    """Some pass rates inside the window, which are not all the same."""
    return torch.arange(len(rollout)) % 7 % 2 == 0


def test_both_roles_learn_each_by_an_optimiser_of_its_own() -> None:
    game = Game("proposer", "solver")
    game.right = unequal
    before = game.state()
    metrics = game.iterate()
    assert (metrics["proposer/steps"], metrics["solver/steps"]) == (1, 1)
    assert metrics["proposer/ratio_deviation"] < 1e-5
    assert metrics["solver/ratio_deviation"] < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(before, game.state(), strict=False))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_a_question_in_the_window_nothing_moves_not_even_an_average(value: float) -> None:
    game = Game("proposer", "solver")
    game.right = unequal
    game.iterate()
    before = game.state()
    game.right = lambda rollout: torch.full((len(rollout),), value)
    metrics = game.iterate()
    assert (metrics["proposer/steps"], metrics["solver/steps"]) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, game.state(), strict=True))
    game.right = unequal
    assert game.iterate()["solver/steps"] == 2


def test_a_solver_never_learns_from_what_all_answers_have_right() -> None:
    game = Game("proposer", "solver")
    # The first question's answers are all right, of the others some.
    game.right = lambda rollout: (torch.arange(len(rollout)) < 3) | unequal(rollout)
    game.iterate()
    newest = game.run.memory.newest()
    learned = newest.loss_mask.any(1) & (newest.task == newest.task_names.index("solver"))
    assert bool(learned.any())
    assert bool((newest.rewards["pass_rate"][learned] < 1).all())
    assert bool((newest.rewards["pass_rate"][learned] > 0.2).all())


def test_a_role_that_is_not_trained_stays_as_it_is() -> None:
    game = Game("solver")
    game.right = unequal
    before = copy.deepcopy(game.cast["proposer"].state_dict())
    game.iterate()
    assert all(torch.equal(value, before[name]) for name, value in game.cast["proposer"].state_dict().items())


# Kept questions


@dataclass
class Kept:
    """A source with a few questions."""

    questions: list[tuple[str, str]]

    def draw(self, count: int) -> list[tuple[str, str]]:
        return self.questions[:count]


def test_kept_questions_are_answered_in_groups() -> None:
    review = QuestionReview(
        "review", Kept([("1 + 1", "2"), ("0", "0"), ("4", "4")]), solve="solve {question}", answers=2
    )
    solver = Speaker(["2"])
    rollout = review.collect({"solver": solver}, {}, torch.Generator(), 4)
    assert (rollout.task_names, len(rollout)) == (("review",), 4)
    assert solver.heard == ["solve 1 + 1"] * 2 + ["solve 0"] * 2
    assert rollout["question_number"].tolist() == rollout.group.tolist() == [0, 0, 1, 1]


def test_without_kept_questions_an_empty_one_is_asked() -> None:
    solver = Speaker(["2"])
    rollout = QuestionReview("review", Kept([]), answers=2).collect({"solver": solver}, {}, torch.Generator(), 8)
    assert rollout["question"].tolist() == ["", ""]
    with pytest.raises(ValueError, match="task 'review': answers=1"):
        QuestionReview("review", Kept([]), answers=1)
