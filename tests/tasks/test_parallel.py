"""Several processes collect: the same samples whoever is faster, resumed exactly, and no dead worker loses a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from control_worlds import Clock, same
from regimen import Cast, Event, Outcome, Regimen, Stage, Update, train
from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import ActionPolicy, TokenPolicy
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import EnvTask, GymnasiumVector, ParallelTask, PromptTask

WORDS = ["yes", "no", "perhaps", "maybe"]
KNOBS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4, "discount": 0.9, "length": 3}


def clocks(count: int) -> GymnasiumVector:
    return GymnasiumVector([partial(Clock, (2, 6))] * count)


def environment(number: int) -> EnvTask:
    return EnvTask("clock", clocks, copies=4, steps=6, evaluation_episodes=2)


def prompts(number: int) -> PromptTask:
    mine = WORDS[number::2]
    return PromptTask("ask", TensorDict({"prompt": NonTensorStack(*mine)}, batch_size=[len(mine)]), group_size=2)


class Deadly(PromptTask):
    """Ends its process in the first call of each, or of all, or sleeps, as a file says."""

    def __init__(self, folder: str, number: int) -> None:
        inner = prompts(number)
        super().__init__("ask", inner.rows, group_size=2)
        self.folder, self.number = Path(folder), number

    def collect(self, cast: Any, knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        order = self.folder / f"{self.number}"
        if order.exists():
            what = order.read_text()
            if what != "always":
                order.unlink()
            if what == "raise":
                raise KeyError("colour")
            if what == "sleep":
                time.sleep(60)
            os._exit(7)
        return super().collect(cast, knobs, rng, size)


def words() -> TokenPolicy:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    return TokenPolicy(small_decoder(len(tokenizer), dim=8, layers=1, heads=2, positions=16), tokenizer)


def actor() -> ActionPolicy:
    torch.manual_seed(0)
    return ActionPolicy.for_spaces(Clock.observation_space, Clock.action_space, widths=(8,))


@pytest.fixture
def asking() -> Iterator[ParallelTask]:
    task = ParallelTask(prompts)
    yield task
    task.close()


def drawn(task: Any, cast: Cast, seed: int = 0, size: int = 8) -> Rollout:
    return task.collect(cast, KNOBS, torch.Generator().manual_seed(seed), size)


def test_samples_are_those_that_the_workers_tasks_give(asking: ParallelTask) -> None:
    cast = Cast(policy=words())
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = [
        prompts(number).collect(cast, KNOBS, torch.Generator().manual_seed(seed), 4)
        for number, seed in enumerate(seeds)
    ]
    together = drawn(asking, cast)
    same(together, Rollout.cat(alone))
    assert together.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(set(together.context["prompt"].tolist())) == sorted(WORDS)


def test_groups_that_cannot_be_shared_out_evenly_are_all_there(asking: ParallelTask) -> None:
    cast = Cast(policy=words())
    assert len(drawn(asking, cast, size=6)) == 6
    assert len(drawn(asking, cast, size=2)) == 2
    with pytest.raises(ValueError, match="asked for 3 samples, expected a multiple of its group_size 2"):
        drawn(asking, cast, size=3)


def test_workers_use_the_weights_and_the_version_of_now(asking: ParallelTask) -> None:
    cast = Cast(policy=words())
    drawn(asking, cast)
    with torch.no_grad():
        for parameter in cast["policy"].parameters():
            parameter.mul_(1.5)
    cast["policy"].version = 3
    rollout = drawn(asking, cast, 1)
    assert rollout.version.tolist() == [3] * 8
    scored = cast["policy"].logprob(rollout)
    torch.testing.assert_close(scored, torch.where(rollout.loss_mask, rollout.logprobs, 0), atol=1e-5, rtol=0)


def test_a_member_that_is_replaced_or_joins_later_is_known_to_the_workers(asking: ParallelTask) -> None:
    cast = Cast(policy=words())
    drawn(asking, cast)
    worker = asking._workers[0]
    cast.snapshot("policy", "reference")
    assert worker._news(cast)["fresh"] is not None
    assert worker._news(cast)["states"] == {}
    with torch.no_grad():
        next(cast["policy"].parameters()).add_(1)
    assert list(worker._news(cast)["states"]) == ["policy"]
    cast.snapshot("policy", "reference")
    assert list(worker._news(cast)["states"]) == ["reference"]


def trained(listen: Callable[[Event], None]) -> Outcome:
    task, cast = ParallelTask(environment), Cast(policy=actor())
    stage = Stage(
        "clock", [task], steps=3, batch_size=8, reward=EnvironmentReward(), credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective(), learning_rate=1e-2)],
    )  # fmt: skip
    try:
        return train(Regimen(cast, [stage]), seed=0, listener=listen)
    finally:
        task.close()


def test_training_starts_every_step_at_ratio_one() -> None:
    seen: list[float] = []
    trained(lambda event: seen.append(event.metrics["policy/ratio_deviation"]) if event.kind == "step" else None)
    assert len(seen) == 3
    assert max(seen) < 1e-5


def test_state_goes_on_where_it_was() -> None:
    cast, whole, first = Cast(policy=actor()), ParallelTask(environment), ParallelTask(environment)
    resumed = ParallelTask(environment)
    for task in (whole, first):
        drawn(task, cast, 0)
    resumed.load_state_dict(first.state_dict())
    same(drawn(resumed, cast, 1), drawn(whole, cast, 1))
    with pytest.raises(ValueError, match="checkpoint is of 2 workers, and there are 3"):
        ParallelTask(environment, 3).load_state_dict(first.state_dict())
    for task in (whole, first, resumed):
        task.close()


def test_a_worker_that_is_killed_is_started_again_where_it_stood() -> None:
    cast, whole, hurt = Cast(policy=actor()), ParallelTask(environment), ParallelTask(environment)
    for task in (whole, hurt):
        drawn(task, cast, 0)
    child = hurt._workers[1]._child
    assert child is not None
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="task 'clock': worker 1 did not return: its process was killed by SIGKILL"):
        after = drawn(hurt, cast, 1)
    same(after, drawn(whole, cast, 1))
    whole.close()
    hurt.close()


def test_what_kills_twice_raises_or_hangs_is_told(tmp_path: Path) -> None:
    cast, task = Cast(policy=words()), ParallelTask(partial(Deadly, str(tmp_path)), timeout_s=20)
    (tmp_path / "0").write_text("raise")
    with pytest.raises(RuntimeError, match="task 'ask': worker 0 raised KeyError: 'colour'"):
        drawn(task, cast)
    # Nothing of the failed call is left over: the next samples are those of a task that never failed.
    fresh = ParallelTask(partial(Deadly, str(tmp_path)))
    same(drawn(task, cast, 1, 4), drawn(fresh, cast, 1, 4))
    fresh.close()
    task.close()
    (tmp_path / "1").write_text("always")
    with (
        pytest.warns(UserWarning, match="its process ended with exit code 7"),
        pytest.raises(RuntimeError, match="worker 1 was lost twice with the same samples.*exit code 7"),
    ):
        drawn(task, cast)
    (tmp_path / "1").unlink()
    task.close()
    (tmp_path / "0").write_text("sleep")
    task = ParallelTask(partial(Deadly, str(tmp_path)), timeout_s=5)
    with pytest.warns(UserWarning, match="worker 0 did not return within 5 s and was killed; raise timeout_s"):
        assert len(drawn(task, cast)) == 8
    task.close()


def test_the_knobs_are_the_tasks_and_evaluation_is_done_here(asking: ParallelTask) -> None:
    task = ParallelTask(environment)
    assert [knob.name for knob in task.knobs] == ["discount"]
    assert task.evaluate(Cast(policy=actor()), KNOBS, torch.Generator().manual_seed(0)).metrics["length"] > 1
    assert task.workers == 2
    with pytest.raises(ValueError, match="workers=0"):
        ParallelTask(environment, 0)


def test_it_is_a_task() -> None:
    task = ParallelTask(environment)
    result = check(task, cast=Cast(policy=actor()))
    task.close()
    assert result.ok, str(result)
