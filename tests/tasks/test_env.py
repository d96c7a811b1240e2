"""Environments as tasks, through the real path: acting, recording, judging, crediting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor

from control_worlds import Clock, Coin, Mixed, Remember, same
from regimen import Knob, Knobs, Rollout
from regimen.checkers import assert_ok
from regimen.credit import GAE, GroupRelativeAdvantage
from regimen.models import ValueHead
from regimen.policies import ActionPolicy
from regimen.rewards import EnvironmentReward, Scene, judge
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks import EnvTask, Evaluation, GymnasiumVector, Task
from regimen.tasks.environments.tensor import GridWorld

LENGTH = Knob("length", 5, 1, 100, integer=True)


def clock_task(
    length: int | tuple[int, int] = 5, limit: bool = False, reads: tuple[Knob, ...] = (), **settings: Any
) -> EnvTask:
    def make(count: int) -> GymnasiumVector:
        return GymnasiumVector([partial(Clock, length, limit)] * count, reads=reads, tells=["success"])

    return EnvTask("clock", make, **settings)


def collected(task: EnvTask, times: int = 1, policy: Any = None, seed: int = 0, **knobs: float) -> list[Rollout]:
    policy, rng = policy or Coin(), torch.Generator().manual_seed(seed)
    return [task.collect({"policy": policy}, Knobs.of(policy, task, **knobs), rng, task.copies) for _ in range(times)]


def credited(rollout: Rollout, lam: float, critic: Callable[[Tensor], Tensor]) -> Rollout:
    """Judged by what the environment paid, credited by GAE with a critic of observations."""
    judged, _ = judge(EnvironmentReward(), rollout, Scene())
    cast = {"critic": lambda r: critic(r.observations.double()).float()}
    return GAE(lam, normalize=None)(judged, {}, cast)


def ends_at(seen: Tensor, discount: float) -> Tensor:
    """The value of a state in a clock that terminates: one more reward for every step that is left."""
    left = seen[..., 1] - seen[..., 0]
    return left if discount == 1 else (1 - discount**left) / (1 - discount)


@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize("discount", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("length", [1, 3, 5, (1, 6), 40])
def test_true_values_of_episodes_that_terminate_leave_no_advantage(
    episodes: bool, discount: float, lam: float, length: int | tuple[int, int]
) -> None:
    """Whatever the length, wherever samples begin and end: the values are the closed form, so nothing is better."""
    task = clock_task(length, copies=3, steps=11, episodes=episodes, discount=discount)
    for rollout in collected(task, 3):
        values = partial(ends_at, discount=discount)
        result = credited(rollout, lam, values)
        mask = rollout.mask
        assert torch.allclose(result.advantages, torch.zeros(mask.shape), atol=1e-5)
        assert torch.allclose(result["value_target"][mask], values(rollout.observations)[mask].float(), atol=1e-5)


@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize("discount", [0.5, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("length", [1, 3, 5, (1, 6), 40])
def test_a_time_limit_ends_no_value(episodes: bool, discount: float, lam: float, length: int | tuple[int, int]) -> None:
    """An episode that is only cut off is worth 1 / (1 - discount) at every step: it would have paid for ever."""
    task = clock_task(length, limit=True, copies=3, steps=11, episodes=episodes, discount=discount)
    forever = 1 / (1 - discount)
    for rollout in collected(task, 3):
        result = credited(rollout, lam, lambda seen: torch.full(seen.shape[:-1], forever))
        assert torch.allclose(result.advantages, torch.zeros(rollout.mask.shape), atol=1e-5)
        assert torch.allclose(result["value_target"][rollout.mask], torch.tensor(forever), atol=1e-5)


def by_hand(
    row: Tensor, steps: int, discount: float, lam: float, limit: bool, critic: Callable[[Tensor], Tensor]
) -> list[float]:
    """Advantages of a row's first steps, episode by episode, from what the clock shows and nothing else."""
    value = [float(critic(seen)) for seen in row[:steps]]
    found, following = [0.0] * steps, 0.0
    for step in reversed(range(steps)):
        taken, length, _ = row[step].tolist()
        over = taken + 1 == length
        if over or step == steps - 1:
            after = 0.0 if over and not limit else float(critic(torch.tensor([taken + 1, length, 0.0])))
            following = 0.0
        else:
            after = value[step + 1]
        found[step] = following = 1 + discount * after - value[step] + discount * lam * following
    return found


@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize(("discount", "lam"), [(0.9, 0.95), (1.0, 0.5), (0.5, 0.0), (0.99, 1.0)])
def test_advantages_of_a_wrong_critic_are_those_by_hand(
    episodes: bool, limit: bool, discount: float, lam: float
) -> None:
    """The critic is asked about the true last observation of an episode, not about the next one's first."""

    def critic(seen: Tensor) -> Tensor:
        return 3 + torch.sin(2 * seen[..., 0]) + seen[..., 1] / 5

    task = clock_task((1, 6), limit, copies=4, steps=13, episodes=episodes, discount=discount)
    for rollout in collected(task, 3):
        found = credited(rollout, lam, critic).advantages
        for row, steps in enumerate(rollout.lengths.tolist()):
            expected = by_hand(rollout.observations[row], steps, discount, lam, limit, critic)
            assert found[row, :steps].tolist() == pytest.approx(expected, abs=1e-4)
            assert found[row, steps:].tolist() == [0.0] * (rollout.steps - steps)


def test_samples_go_on_where_the_last_ones_ended() -> None:
    task = clock_task(5, copies=2, steps=7)
    rows = torch.cat([r.observations[0, :, 0] for r in collected(task, 2)])
    assert rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    first, second = collected(clock_task(5, copies=2, steps=7), 2)
    assert first["start"][0].nonzero().flatten().tolist() == [0, 5]
    assert second["start"][0].nonzero().flatten().tolist() == [3]
    assert first["next_observations"][0, :, 0].tolist() == [1, 2, 3, 4, 5, 1, 2]


def test_termination_is_discount_0_and_a_cut_is_where_the_row_does_not_go_on() -> None:
    (over,) = collected(clock_task(3, copies=1, steps=7, discount=0.5))
    assert over.discount[0].tolist() == [0.5, 0.5, 0, 0.5, 0.5, 0, 0.5]
    assert over["cut"][0].nonzero().flatten().tolist() == [6]
    (limited,) = collected(clock_task(3, limit=True, copies=1, steps=6, discount=0.5))
    assert limited.discount[0].tolist() == [0.5] * 6
    assert limited["cut"][0].nonzero().flatten().tolist() == [2, 5]


def test_whole_episodes_are_padded_to_the_longest() -> None:
    task = clock_task((1, 9), copies=20, steps=7, episodes=True, discount=0.5)
    (rollout,) = collected(task)
    lengths = rollout.observations[:, 0, 1].long().clamp(max=7)
    assert len(lengths.unique()) > 2
    assert torch.equal(rollout.lengths, lengths)
    assert rollout.steps == int(lengths.max())
    assert rollout["start"][:, 0].all()
    last = rollout.lengths - 1
    unfinished = rollout.observations[:, 0, 1] > 7
    assert torch.equal(rollout["cut"].sum(1), unfinished.long())
    assert torch.equal(rollout.discount.gather(1, last[:, None]).squeeze(1) == 0, ~unfinished)


def test_a_sample_that_another_tasks_samples_outlast_is_still_cut_at_its_own_end() -> None:
    short, long = clock_task(40, copies=1, steps=3, discount=0.5), clock_task(40, copies=1, steps=5, discount=0.5)
    both = Rollout.cat([*collected(short), *collected(long)])
    result = credited(both, 0.7, lambda seen: torch.full(seen.shape[:-1], 2.0))
    assert torch.allclose(result.advantages, torch.zeros(2, 5))


def test_several_stretches_make_one_rollout() -> None:
    task = clock_task(5, copies=2, steps=4)
    rollout = task.collect({"policy": Coin()}, Knobs.of(task), torch.Generator().manual_seed(0), 6)
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout["copy"].tolist() == [0, 1] * 3
    assert rollout.observations[::2, :, 0].flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_siblings_start_alike_and_form_a_group() -> None:
    task = clock_task((1, 50), copies=6, steps=60, episodes=True, siblings=3)
    assert task.group_size == 3
    rng, cast = torch.Generator().manual_seed(1), {"policy": Coin()}
    rollout = task.collect(cast, Knobs.of(task), rng, 9)
    assert rollout.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [len(part.unique()) for part in rollout.lengths.split(3)] == [1, 1, 1]
    assert len(rollout.lengths.unique()) == 3
    judged, _ = judge(EnvironmentReward(), rollout, Scene())
    assert not GroupRelativeAdvantage()(judged, {}, {}).advantages.any()


def test_a_knob_reaches_the_environment_at_the_next_reset_and_is_recorded_per_episode() -> None:
    task = clock_task(reads=(LENGTH,), copies=1, steps=4)
    assert [knob.name for knob in task.knobs] == ["discount", "length"]
    rng, board = torch.Generator().manual_seed(0), Knobs.of(task)
    first = task.collect({"policy": Coin()}, board, rng, 1)
    board.set("length", 2, by="a controller")
    second = task.collect({"policy": Coin()}, board, rng, 1)
    taken = torch.cat([first.observations[0, :, 0], second.observations[0, :, 0]]).tolist()
    assert taken == [0, 1, 2, 3, 4, 0, 1, 0]
    episode = torch.cat([first["knob/length"][0], second["knob/length"][0]]).tolist()
    assert episode == [5, 5, 5, 5, 5, 2, 2, 2]
    assert second.knobs["length"].tolist() == [2]


def test_copies_that_restart_at_different_times_have_knobs_of_their_own() -> None:
    wind = Knob("wind", 0.0)

    def make(count: int) -> GymnasiumVector:
        return GymnasiumVector([partial(Clock, 5), partial(Clock, 3)], reads=[wind])

    task, rng = EnvTask("clock", make, copies=2, steps=1), torch.Generator().manual_seed(0)
    rows = [task.collect({"policy": Coin()}, {"wind": float(t), "discount": 1.0}, rng, 2) for t in range(8)]
    assert torch.cat([r["knob/wind"] for r in rows], 1).tolist() == [[0, 0, 0, 0, 0, 5, 5, 5], [0, 0, 0, 3, 3, 3, 6, 6]]


def test_a_resumed_task_knows_the_knobs_of_episodes_under_way() -> None:
    task = clock_task(reads=(LENGTH,), copies=1, steps=2)
    rng, board = torch.Generator().manual_seed(0), Knobs.of(task)
    task.collect({"policy": Coin()}, board, rng, 1)
    again = clock_task(reads=(LENGTH,), copies=1, steps=2)
    again.load_state_dict(unpack_tree(pack_tree(task.state_dict())))
    board.set("length", 3, by="a controller")
    rollout = again.collect({"policy": Coin()}, board, rng, 1)
    assert rollout["knob/length"].tolist() == [[5, 5]]
    assert rollout.observations[0, :, 1].tolist() == [5, 5]


def test_what_the_environment_tells_is_a_column_and_0_where_it_does_not() -> None:
    (rollout,) = collected(clock_task(3, copies=2, steps=7))
    assert rollout["success"].tolist() == [[0, 0, 1, 0, 0, 1, 0]] * 2


def test_evaluation_is_of_whole_episodes_and_moves_nothing() -> None:
    task = clock_task((2, 9), copies=2, steps=4, evaluation_episodes=50)
    cast, board = {"policy": Coin()}, Knobs.of(task)
    before = collected(task, 1)
    found = task.evaluate(cast, board, torch.Generator().manual_seed(3))
    assert isinstance(found, Evaluation)
    assert found.metrics == task.evaluate(cast, board, torch.Generator().manual_seed(3)).metrics
    assert found.metrics["return"] == found.metrics["length"] == pytest.approx(5.5, abs=1)
    assert found.metrics["success"] == 1
    fresh = clock_task((2, 9), copies=2, steps=4)
    same(before[0], collected(fresh, 1)[0])
    limited = clock_task(20, evaluation_steps=7).evaluate(cast, board, torch.Generator().manual_seed(3))
    assert limited.metrics == {"return": 7, "length": 7, "success": 0}


def policies() -> dict[str, tuple[Callable[[], EnvTask], dict[str, Any]]]:
    def mixed(count: int) -> GymnasiumVector:
        return GymnasiumVector([Mixed] * count)

    grid = partial(GridWorld, lines=["S.#", "..G"], slip=0.3, limit=9)
    return {
        "clock": (lambda: clock_task((1, 6), copies=3, steps=5), {}),
        "memory": (lambda: clock_task((1, 6), copies=3, steps=5), {"recurrent": 4}),
        "table": (lambda: EnvTask("mixed", mixed, copies=3, steps=5), {"recurrent": 4}),
        "grid": (lambda: EnvTask("grid", grid, copies=3, steps=5), {}),
        "episodes": (lambda: clock_task((1, 6), copies=3, steps=5, episodes=True), {"recurrent": 4}),
    }


@pytest.mark.parametrize("at_hand", [1, 2])
@pytest.mark.parametrize("kind", policies())
def test_a_stretch_put_together_in_parts_is_that_of_one_piece(
    monkeypatch: pytest.MonkeyPatch, kind: str, at_hand: int
) -> None:
    def found() -> tuple[list[Rollout], Evaluation]:
        make, settings = policies()[kind]
        torch.manual_seed(0)
        task = make()
        policy = ActionPolicy.for_spaces(*task.spaces, **settings)
        rng = torch.Generator().manual_seed(0)
        return collected(task, 2, policy), task.evaluate({"policy": policy}, Knobs.of(policy, task), rng)

    whole, evaluated = found()
    monkeypatch.setattr("regimen.tasks.stretch._AT_HAND", at_hand)
    parts, again = found()
    for one, other in zip(whole, parts, strict=True):
        same(one, other)
    assert evaluated == again


@pytest.mark.parametrize("kind", policies())
def test_our_tasks_pass_the_check_of_tasks(kind: str) -> None:
    """Among others: a resumed task collects what the interrupted one would have."""
    make, settings = policies()[kind]
    torch.manual_seed(0)
    task = make()
    policy = ActionPolicy.for_spaces(*task.spaces, **settings)
    assert isinstance(task, Task)
    assert_ok(task, cast={"policy": policy})


@pytest.mark.parametrize("kind", policies())
def test_resume_in_mid_episode_is_exact(kind: str) -> None:
    make, settings = policies()[kind]
    torch.manual_seed(0)
    task, again = make(), make()
    policy = ActionPolicy.for_spaces(*task.spaces, **settings)
    board, rng = Knobs.of(policy, task), torch.Generator().manual_seed(0)
    cast = {"policy": policy}
    for _ in range(3):
        task.collect(cast, board, rng, 3)
    saved, drawn = unpack_tree(pack_tree(task.state_dict())), rng.get_state()
    again.load_state_dict(saved)
    other = torch.Generator()
    other.set_state(drawn)
    for _ in range(3):
        same(task.collect(cast, board, rng, 3), again.collect(cast, board, other, 3))


def test_a_policy_with_memory_records_what_it_remembered_before_each_sample() -> None:
    torch.manual_seed(0)
    task = EnvTask("remember", lambda n: GymnasiumVector([Remember] * n), copies=2, steps=3)
    policy = ActionPolicy.for_spaces(*task.spaces, recurrent=4)
    rollout = task.collect({"policy": policy}, Knobs.of(policy, task), torch.Generator().manual_seed(0), 4)
    assert not rollout["memory"][:2].any()
    assert rollout["memory"][2:].all()


def test_a_shared_critic_bootstraps_with_the_memory_that_led_there() -> None:
    """Values after a cut are those that the next step's state would have."""
    torch.manual_seed(0)
    task = clock_task((2, 6), limit=True, copies=3, steps=9, discount=0.5)
    policy = ActionPolicy.for_spaces(*task.spaces, recurrent=4)
    critic = torch.nn.Linear(4, 1)
    cast = {"policy": policy, "critic": lambda hidden: critic(hidden).squeeze(-1)}
    for rollout in collected(task, 2, policy):
        judged, _ = judge(EnvironmentReward(), rollout, Scene())
        found = GAE(0.0, normalize=None, reads="policy")(judged, {}, cast)["value_target"]
        memory = rollout["memory"]
        for step in range(rollout.steps):
            memory = torch.where(rollout["start"][:, step, None], 0, memory)
            memory = policy.core(policy.torso(rollout.observations[:, step]), memory)
            after = policy.core(policy.torso(rollout["next_observations"][:, step]), memory)
            expected = 1 + 0.5 * critic(after).squeeze(-1)
            assert torch.allclose(found[:, step], expected, atol=1e-5)


@pytest.mark.parametrize("recurrent", [None, 4])
def test_where_every_episode_terminates_nothing_is_bootstrapped(recurrent: int | None) -> None:
    torch.manual_seed(0)
    task = clock_task((1, 6), copies=3, steps=9, episodes=True, discount=1.0)
    policy = ActionPolicy.for_spaces(*task.spaces, recurrent=recurrent)
    (rollout,) = collected(task, 1, policy)
    judged, _ = judge(EnvironmentReward(), rollout, Scene())
    cast = {"policy": policy, "critic": ValueHead(recurrent or 64)}
    found = GAE(1.0, normalize=None, reads="policy")(judged, {}, cast)["value_target"]
    assert torch.equal(found, torch.where(rollout.mask, ends_at(rollout.observations, 1.0), 0))


def test_a_cut_whose_value_nobody_can_tell_is_refused() -> None:
    (rollout,) = collected(clock_task(9, copies=2, steps=4))
    judged, _ = judge(EnvironmentReward(), rollout.with_step_columns(values=torch.zeros(2, 4)), Scene())
    with pytest.raises(ValueError, match="after the steps where samples of task clock were cut .* a member 'critic'"):
        GAE()(judged, {}, {"policy": Coin()})
    told = judged.with_step_columns(bootstrap=torch.full((2, 4), 100.0))
    targets = GAE(1.0, normalize=None)(told, {}, {})["value_target"]
    assert targets[0].tolist() == pytest.approx([sum(0.99**k for k in range(n)) + 0.99**n * 100 for n in (4, 3, 2, 1)])


def test_bad_settings_are_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match="task 'clock': copies=0, steps=128.*expected every number to be at least 1"):
        clock_task(copies=0)
    with pytest.raises(ValueError, match="siblings=3 with copies=8, episodes=True; .* must divide the copies"):
        clock_task(episodes=True, siblings=3)
    with pytest.raises(ValueError, match="siblings=2 with copies=8, episodes=False; siblings are whole episodes"):
        clock_task(siblings=2)
    task = clock_task(copies=4)
    with pytest.raises(ValueError, match="task 'clock' was asked for 6 samples; expected a multiple of 4, its copies"):
        task.collect({"policy": Coin()}, Knobs.of(task), torch.Generator(), 6)
    with pytest.raises(ValueError, match="member 'policy' is a Linear, which does not act step by step"):
        task.collect({"policy": torch.nn.Linear(1, 1)}, Knobs.of(task), torch.Generator(), 4)


def test_observations_that_are_not_finite_are_named() -> None:
    class Broken(Clock):
        def step(self, action: Any) -> Any:
            _, *rest = super().step(action)
            return (np.array([self.taken, np.nan if self.taken == 2 else 0, 0]), *rest)

    task = EnvTask("broken", lambda n: GymnasiumVector([Clock, Broken]), copies=2, steps=4)
    with pytest.raises(ValueError, match=r"task 'broken': .* not finite in copy 1 \(\[2.0, nan, 0.0\]\); mend"):
        collected(task)


def test_spaces_are_those_of_one_copy() -> None:
    observations, actions = clock_task().spaces
    assert observations.shape == (3,)
    assert actions == spaces.Discrete(2)
