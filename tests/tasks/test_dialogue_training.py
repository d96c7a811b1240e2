"""Dialogues that fail, are evaluated, credited and learned from; runs of them that go on; bad input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dialogues import GAME, Scripted, Talk, collect, halving, judged, talks, tiny
from torch import Tensor

from regimen import Cast, Event, Interrupted, Knob, Knobs, Regimen, Stage, Update, check, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.credit.gae import GAE
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.models.value_head import ValueHead
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus
from regimen.objectives.value import ValueObjective
from regimen.policies.token import TokenPolicy
from regimen.rewards import EnvironmentReward, Scene, judge
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks import DialogueTask, OneByOne, Reply

# Failures


class Frail(Talk):
    """Raises or answers nonsense, at the start or in turn 2, as its number says."""

    def __init__(self, start: int) -> None:
        super().__init__(["on"])
        self.start = start
        if start == 1:
            raise OSError("no such city")
        if start == 2:
            self.opening = "on " * 80

    def reply(self, text: str) -> Any:
        answer = super().reply(text)
        if answer.done and self.start == 3:
            return 1 / 0
        if answer.done and self.start == 4:
            return "well"
        if answer.done and self.start == 5:
            return Reply("well", reward=float("nan"))
        return answer


WHY = [
    "",
    "the environment, when it began, raised OSError: no such city",
    "the opening has 81 tokens, and there is room for 60 before an answer; shorten it, or lower the knob "
    "max_new_tokens",
    "the environment raised ZeroDivisionError: division by zero",
    "the environment answered a str, expected a Reply",
    "the environment gave reward nan, expected a finite number",
    "",
]


def frail() -> Rollout:
    task = DialogueTask(
        "frail", OneByOne(lambda start, random: Frail(start)), starts=range(7), order="sequential", evaluation=()
    )
    return collect(task, Scripted(lambda text: "yes"), 7)


def test_a_dialogue_that_fails_leaves_the_loss_alone_and_says_why() -> None:
    rollout = frail()
    assert list(rollout["failure"]) == WHY
    assert rollout.loss_mask.any(1).tolist() == [not why for why in WHY]
    assert rollout.mask.any(1).all()
    assert rollout["turns"].tolist() == [2, 0, 0, 2, 2, 2, 2]
    assert torch.equal(rollout["env_reward"].sum(1), torch.tensor([1.0, 0, 0, 0, 0, 0, 1]))
    assert not rollout["truncated"].any()


def test_failures_are_counted_by_the_judge_with_their_reasons() -> None:
    rollout, report = judge(EnvironmentReward(), frail(), Scene())
    assert report.counts == {("frail", "environment"): (2, 0, 5)}
    assert report.failed == 5
    assert report.errors == tuple(WHY[1:6])
    assert torch.equal(rollout.loss_mask.any(1), torch.tensor([not why for why in WHY]))


def test_a_failed_sibling_counts_nowhere_in_its_group() -> None:
    rewards = iter([1.0, None, 0.0, 0.5])

    def make(start: int, random: Random) -> Talk:
        reward = next(rewards)
        return Talk([Reply(reward=reward, done=True) if reward is not None else "broken"][:1])

    class Broken(OneByOne):
        def step(self, state: Any, rows: Sequence[int], texts: Sequence[str]) -> list[Reply]:
            replies = super().step(state, rows, texts)
            return [Reply(failure="broken") if reply.text == "broken" else reply for reply in replies]

    rollout = collect(DialogueTask("talk", Broken(make), group_size=4), Scripted(lambda text: "yes"), 4)
    credited = GroupRelativeAdvantage()(judged(rollout), {}, {})
    expected = (torch.tensor([1.0, 0.0, 0.5]) - 0.5) / (0.5 + 1e-4)
    assert torch.allclose(credited.advantages[[0, 2, 3], -1], expected, atol=1e-5)
    assert not credited.advantages[1].any()


@pytest.mark.parametrize("when", ["reset", "step"])
def test_a_batch_that_raises_fails_as_a_whole(when: str) -> None:
    class Batched(OneByOne):
        pass

    def fails(*arguments: Any) -> Any:
        raise ConnectionError("no simulator")

    setattr(Batched, when, fails)
    task = DialogueTask("talk", Batched(lambda start, random: Talk([])), evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 2)
    assert list(rollout["failure"]) == [f"the environment's {when} raised ConnectionError: no simulator"] * 2
    assert not rollout.loss_mask.any()


def test_a_reply_too_few_is_an_error() -> None:
    class Forgetful(OneByOne):
        def step(self, state: Any, rows: Sequence[int], texts: Sequence[str]) -> list[Reply]:
            return super().step(state, rows, texts)[:-1]

    task = DialogueTask("talk", Forgetful(lambda start, random: Talk([])), evaluation=())
    with pytest.raises(ValueError, match="task 'talk': the environment gave 1 replies for 2 dialogues; expected one"):
        collect(task, Scripted(lambda text: "yes"), 2)


# Evaluation


def test_evaluation_of_the_best_player() -> None:
    """Halving 1 to 7 finds 4 in one guess, 2 and 6 in two, the others in three."""
    policy = Scripted(halving, GAME.words)
    task = DialogueTask("guess", OneByOne(GAME), max_turns=5, evaluation=range(7))
    board = Knobs.of(policy, task)
    found = task.evaluate({"policy": policy}, board.for_evaluation(), torch.Generator())
    assert found.metrics == {
        "failed": 0.0, "return": 1.0, "success": 1.0, "turns": pytest.approx(17 / 7), "truncated": 0.0
    }  # fmt: skip
    assert found.samples["dialogues"][0] == "guess from 1 to 7\n4\nlower\n2\nlower\n1\nright"
    assert found.samples["dialogues"][3] == "guess from 1 to 7\n4\nright"


def test_evaluation_leaves_out_what_failed() -> None:
    env = OneByOne(lambda start, random: Frail(start))
    policy = Scripted(lambda text: "yes")
    task = DialogueTask("frail", env, starts=[9], evaluation=range(4))
    found = task.evaluate({"policy": policy}, Knobs.of(policy, task), torch.Generator())
    assert found.metrics == {"failed": 0.75, "return": 1.0, "success": 1.0, "turns": 2.0, "truncated": 0.0}
    hopeless = DialogueTask("frail", env, evaluation=[1, 3])
    assert hopeless.evaluate({"policy": policy}, Knobs.of(policy, task), torch.Generator()).metrics == {"failed": 1.0}


def test_evaluation_is_greedy_and_may_be_of_another_member() -> None:
    policy, average = tiny(max_new_tokens=2), tiny("gpt2", max_new_tokens=2)
    settings: dict[str, Any] = {"max_turns": 3, "evaluation": range(7)}
    texts = []
    for evaluated, seed in (("policy", 0), ("policy", 1), ("average", 0)):
        task = DialogueTask("guess", OneByOne(GAME), evaluated=evaluated, **settings)
        board = Knobs.of(policy, task).for_evaluation()
        cast = {"policy": policy, "average": average}
        texts.append(task.evaluate(cast, board, torch.Generator().manual_seed(seed)).samples["dialogues"])
    assert texts[0] == texts[1] != texts[2]
    nothing = DialogueTask("guess", OneByOne(GAME), evaluation=())
    assert nothing.evaluate({}, {}, torch.Generator()).metrics == {}


# Credit


class Paid(Talk):
    """Three turns that earn 1, 2 and 4."""

    def __init__(self) -> None:
        super().__init__([Reply("on", reward=1), Reply("on", reward=2), Reply(reward=4, done=True)])


def constant(value: float) -> Callable[[Rollout], Tensor]:
    return lambda rollout: torch.full(rollout.mask.shape, value)


def own(rollout: Rollout, values: Tensor) -> list[float]:
    return values[rollout.loss_mask].tolist()


def test_returns_are_discounted_between_turns_only() -> None:
    """Turns of two tokens: 4, 2 + 0.5 * 4, 1 + 0.5 * 4."""
    task = DialogueTask("paid", OneByOne(lambda start, random: Paid()), discount=0.5, evaluation=())
    rollout = judged(collect(task, Scripted(lambda text: "yes"), 1))
    credited = GAE(1.0, normalize=None)(rollout, {}, {"critic": constant(0.0)})
    assert own(credited, credited["value_target"]) == [3, 3, 4, 4, 4, 4]
    assert own(credited, credited.advantages) == [3, 3, 4, 4, 4, 4]
    short = GAE(0.0, normalize=None)(rollout, {}, {"critic": constant(2.0)})
    # r + discount * 2 - 2: within a turn 0; at its end 1 + 1 - 2, 2 + 1 - 2, and 4 - 2, where it ended.
    assert own(short, short.advantages) == [0, 0, 0, 1, 0, 2]


def test_a_dialogue_that_was_cut_off_is_worth_what_the_critic_says() -> None:
    env = OneByOne(lambda start, random: Paid() if start else Talk([Reply(reward=1, done=True)]))
    policy = Scripted(lambda text: "yes")
    settings: dict[str, Any] = {"starts": [0, 1], "order": "sequential", "max_turns": 2, "evaluation": ()}
    task = DialogueTask("paid", env, discount=0.5, critic="critic", **settings)
    cast = {"policy": policy, "critic": constant(8.0)}
    rollout = task.collect(cast, Knobs.of(policy, task), torch.Generator(), 2)
    assert rollout["bootstrap"].tolist() == [0, 8]
    credited = GAE(1.0, normalize=None)(judged(rollout), {}, cast)
    assert own(credited, credited["value_target"]) == [1, 1, 4, 4, 6, 6]
    without = DialogueTask("paid", env, discount=0.5, **settings)
    bare = judged(without.collect(cast, Knobs.of(policy, without), torch.Generator(), 2))
    assert own(bare, GAE(1.0, normalize=None)(bare, {}, cast)["value_target"]) == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_value_behind_a_cut_is_that_of_the_next_turn(kind: str) -> None:
    """The state is the one in which the policy would have spoken next, the last reply read."""
    policy = tiny(kind, max_new_tokens=3)
    head = ValueHead(16)
    torch.nn.init.normal_(head.layer.weight)
    cast = {"policy": policy, "critic": head}
    env = OneByOne(lambda start, random: Talk(["higher " * (1 + start % 3)] * 9))
    found = []
    for turns in (2, 3):
        task = DialogueTask(
            "talk", env, max_turns=turns, starts=range(6), order="sequential", critic="critic", reads="policy",
            evaluation=(),
        )  # fmt: skip
        rng = torch.Generator().manual_seed(0)
        found.append(task.collect(cast, Knobs.of(policy, task), rng, 6))
    cut, longer = found
    values = head(policy.distribution(longer).hidden)
    first = (longer.loss_mask & (longer.segment == 2)).int().argmax(1)
    assert cut["truncated"].all()
    assert torch.allclose(cut["bootstrap"], values[torch.arange(6), first], atol=1e-5)


def test_ppo_with_a_value_head_runs_on_dialogues() -> None:
    policy = tiny(max_new_tokens=2)
    task = DialogueTask("guess", OneByOne(GAME), max_turns=2, critic="critic", reads="policy", evaluation=range(7))
    objective = ClippedSurrogateObjective() + 0.5 * ValueObjective(reads="policy")
    stage = Stage(
        "ppo", [task], 3, 16, reward=EnvironmentReward(), credit=GAE(reads="policy"),
        updates=[Update(objective, members=("policy", "critic"), learning_rate=1e-3)],
        controllers=[Schedule("discount", Linear(0.5, 1.0, 3))],
    )  # fmt: skip
    metrics: list[Mapping[str, Any]] = []
    train(
        Regimen(Cast(policy=policy, critic=ValueHead(16)), [stage]),
        listener=lambda event: metrics.append(event.metrics) if event.kind == "step" else None,
    )
    assert [step["knob/discount"] for step in metrics] == pytest.approx([0.5, 2 / 3, 5 / 6])
    assert all(step["policy+critic/ratio_deviation"] < 1e-5 for step in metrics)


# Learning and resuming

FOLLOWS = {"one": "two", "two": "three", "three": "one"}


class Quiz:
    """Asks in its reply to the first turn what follows a number; the second turn earns 1 if it is the right word."""

    opening = "ready"

    def __init__(self, start: int, random: Random) -> None:
        self.asked, self.word = False, list(FOLLOWS)[start % 3]

    def reply(self, text: str) -> Reply:
        if not self.asked:
            self.asked = True
            return Reply(f"after {self.word}")
        right = text == FOLLOWS[self.word]
        return Reply(reward=float(right), done=True, success=right)


def quiz() -> Regimen:
    tokenizer = word_tokenizer(["ready", "after", *FOLLOWS])
    policy = TokenPolicy(
        small_decoder(len(tokenizer), dim=32, layers=1, heads=2, positions=32), tokenizer, max_new_tokens=1
    )
    task = DialogueTask("quiz", OneByOne(Quiz), max_turns=2, group_size=8, starts=range(3, 9), evaluation=range(3))
    stage = Stage(
        "grpo", [task], 80, 48, reward=EnvironmentReward(), credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective() - 0.02 * EntropyBonus(), learning_rate=3e-3)],
    )  # fmt: skip
    return Regimen(Cast(policy=policy), [stage])


def test_a_decoder_learns_what_to_say_in_turn_two() -> None:
    outcome = train(quiz())
    before, after = (record["metrics"] for record in outcome.evaluations)
    assert before["quiz/return"] < 0.5
    assert after["quiz/return"] == after["quiz/success"] == 1.0
    assert after["quiz/turns"] == 2.0


def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def run(out: Path, stop_at: int | None, resume: bool) -> None:
        def stop(event: Event) -> None:
            if event.kind == "step" and event.step == stop_at:
                raise Interrupted

        regimen = quiz()
        regimen.stages[0].steps = 9
        train(regimen, seed=1, out=out, resume=resume, checkpoint_every=2, listener=stop)

    run(tmp_path / "whole", None, False)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", 6, False)
    run(tmp_path / "cut", None, True)
    whole, cut = (
        [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_starts_are_drawn_in_epochs_and_the_position_is_restored() -> None:
    policy = Scripted(lambda text: "yes")
    task = DialogueTask("talk", talks(), starts=[5, 7, 9], group_size=2, evaluation=())
    first = collect(task, policy, 4)["start_id"].tolist()
    state = task.state_dict()
    rest = collect(task, policy, 4, seed=1)["start_id"].tolist()
    assert sorted((first + rest)[:6]) == [5, 5, 7, 7, 9, 9]
    task.load_state_dict(state)
    assert collect(task, policy, 4, seed=1)["start_id"].tolist() == rest


def test_passes_the_checker() -> None:
    policy = tiny(max_new_tokens=2)
    task = DialogueTask("guess", OneByOne(GAME), max_turns=3, group_size=2, starts=range(10, 20), evaluation=range(7))
    assert check(task, cast={"policy": policy}).ok


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "task 'talk': group_size=1, max_turns=0; expected at least 1"),
        ({"group_size": 0}, "group_size=0"),
        ({"discount": 1.5}, r"knob 'discount': its default gave 1.5, expected a finite number in \[0.0, 1.0\]"),
        ({"starts": []}, "task 'talk' has no rows to draw from"),
        (
            {"starts": range(9), "evaluation": range(5, 20)},
            "4 starts are trained on and held out .first 5.; give other",
        ),
        ({"starts": range(9)}, "9 starts are trained on and held out .first 0."),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DialogueTask("talk", talks(), **settings)


def test_what_cannot_be_collected_is_refused() -> None:
    policy = Scripted(lambda text: "yes")
    with pytest.raises(ValueError, match="asked for 3 samples, expected a multiple of its group_size 2"):
        collect(DialogueTask("talk", talks(), group_size=2), policy, 3)
    with pytest.raises(
        ValueError, match=r"cast has no critic 'judge' \(it has: policy\); add it, or leave critic=None"
    ):
        collect(DialogueTask("talk", talks(), critic="judge"), policy, 1)
    policy.processor = SimpleNamespace(mark=lambda text: text)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="a policy that reads images cannot hold a dialogue"):
        collect(DialogueTask("talk", talks()), policy, 1)


def test_a_knob_of_the_discount_keeps_its_name() -> None:
    task = DialogueTask("talk", talks("on"), discount=Knob("patience", 0.25, 0, 1), evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 1, patience=0.75)
    assert rollout.discount[rollout.loss_mask].tolist() == [1, 0.75, 1, 0]
    assert float(rollout.knobs["patience"]) == 0.75
