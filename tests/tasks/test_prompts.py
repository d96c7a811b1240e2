"""Prompt tasks: groups, what a rollout records, evaluation, mixtures and resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen import Cast, Knobs, Regimen, Stage, train
from regimen.iteration import StageRun
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, Evaluation, PromptTask, Task

Tiny = Callable[..., FlowPolicy]


def rows(count: int = 6) -> TensorDict:
    return TensorDict({"condition": torch.arange(count) % 2, "row": torch.arange(count)}, batch_size=[count])


class Echo:
    """A policy of one step, which answers with the number of its row."""

    knobs = ()

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        self.asked.append(contexts["row"].tolist())
        count = len(contexts)
        return Rollout.create(
            task="policy", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool),
            context=contexts, knobs=knobs, columns={"answer": contexts["row"] + torch.rand(count, generator=rng)},
        )  # fmt: skip


def test_siblings_answer_one_prompt_each_for_itself(rng: torch.Generator) -> None:
    task, policy = PromptTask("ask", rows(), group_size=3, order="sequential"), Echo()
    assert isinstance(task, Task)
    assert task.generates
    rollout = task.collect({"policy": policy}, {"a": 2.0}, rng, 6)
    assert policy.asked == [[0, 0, 0, 1, 1, 1]]
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rollout.task_names == ("ask",)
    assert len(rollout["answer"].unique()) == 6
    assert rollout.knobs["a"].tolist() == [2.0] * 6
    assert ((rollout.finished_at - rollout.started_at) >= 0).all()
    assert float(rollout.started_at[0]) > 1.7e9


@pytest.mark.parametrize("size", [0, 4, -3])
def test_half_a_group_is_refused(size: int, rng: torch.Generator) -> None:
    task = PromptTask("ask", rows(), group_size=3)
    with pytest.raises(ValueError, match=f"task 'ask' was asked for {size} samples, expected a multiple .* 3"):
        task.collect({"policy": Echo()}, {}, rng, size)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="task 'ask': group_size is 0, expected at least 1"):
        PromptTask("ask", rows(), group_size=0)
    with pytest.raises(ValueError, match="task 'ask' has no rows"):
        PromptTask("ask", rows(0))
    with pytest.raises(ValueError, match="order 'best' is not one of"):
        PromptTask("ask", rows(), order="best")  # type: ignore[arg-type]
    spoilt = TensorDict({"reference": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])}, batch_size=[2])
    with pytest.raises(ValueError, match=r"task 'ask': column 'reference' .* in 1 rows \(\[1\]\)"):
        PromptTask("ask", spoilt)


def test_the_named_members_answer_and_are_evaluated(rng: torch.Generator) -> None:
    def measure(policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        return Evaluation({"name": policy})

    cast: dict[str, Any] = {"pupil": Echo(), "copy": 7.0, "policy": 3.0}
    task = PromptTask("ask", rows(), member="pupil", evaluated="copy", evaluate=measure)
    assert len(task.collect(cast, {}, rng, 2)) == 2
    assert task.evaluate(cast, {}, rng).metrics == {"name": 7.0}
    assert PromptTask("ask", rows(), evaluate=measure).evaluate(cast, {}, rng).metrics == {"name": 3.0}
    assert PromptTask("ask", rows()).evaluate(cast, {}, rng).metrics == {}


def test_resume_in_the_middle_of_an_epoch_asks_the_same_prompts(rng: torch.Generator) -> None:
    policy, task, again = Echo(), PromptTask("ask", rows(), group_size=2), PromptTask("ask", rows(), group_size=2)
    task.collect({"policy": policy}, {}, rng, 8)
    state, at = task.state_dict(), rng.get_state()
    expected = [task.collect({"policy": policy}, {}, rng, 8)["answer"] for _ in range(3)]
    again.load_state_dict(state)
    stream = torch.Generator()
    stream.set_state(at)
    found = [again.collect({"policy": policy}, {}, stream, 8)["answer"] for _ in range(3)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_an_epoch_of_groups_asks_every_prompt_once(rng: torch.Generator) -> None:
    policy, task = Echo(), PromptTask("ask", rows(), group_size=4)
    for _ in range(3):
        task.collect({"policy": policy}, {}, rng, 8)
    asked = [row for batch in policy.asked for row in batch[::4]]
    assert sorted(asked) == list(range(6))


@pytest.mark.parametrize(("shares", "expected"), [((1, 1), (12, 12)), ((2, 1), (16, 8)), ((0, 1), (0, 24))])
def test_mixture_shares_out_whole_groups(
    shares: tuple[float, float], expected: tuple[int, int], tiny_policy: Tiny, rng: torch.Generator
) -> None:
    tasks = [PromptTask("a", rows(), group_size=4), PromptTask("b", rows(), group_size=2)]
    stage = Stage("mix", tasks, 1, 24, knobs=dict(zip(("mixture/a", "mixture/b"), shares, strict=True)))
    run = StageRun(Regimen(Cast(policy=tiny_policy()), [stage]), stage)
    sizes = run._sizes()
    assert tuple(sizes.get(name, 0) for name in "ab") == expected
    parts = [task.collect(run.cast, run.board, rng, size) for task in tasks if (size := sizes[task.name])]
    rollout = Rollout.cat(parts)
    for name, size in zip("ab", expected, strict=True):
        part = rollout.of_task(name)
        assert len(part) == size
        assert set(torch.bincount(part.group).tolist()) <= {0, {"a": 4, "b": 2}[name]}


def test_a_prompt_task_and_a_data_set_take_turns_in_one_stage(tiny_policy: Tiny) -> None:
    """Sampled and read rows are counted apart."""
    prompts = PromptTask("ask", rows(), group_size=2)
    data = DatasetTask("read", rows())
    stage = Stage("both", [prompts], 2, 4), Stage("read", [data], 3, 4)
    outcome = train(Regimen(Cast(policy=tiny_policy()), list(stage)))
    assert outcome.counters.samples == 8
    assert outcome.counters.rows == 12


def test_rollout_records_the_knobs_that_it_was_sampled_under(tiny_policy: Tiny, rng: torch.Generator) -> None:
    policy, task = tiny_policy(), PromptTask("ask", rows())
    board = Knobs.of(policy, task, noise_level=0.3)
    rollout = task.collect({"policy": policy}, board, rng, 2)
    board.set("noise_level", 0.9, by="a test")
    assert rollout.knobs["noise_level"].tolist() == pytest.approx([0.3, 0.3])
