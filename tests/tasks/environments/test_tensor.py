"""Environments written as batched tensors: their rules by hand, their streams, their exact resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium.spaces as spaces
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.storage import pack_tree, unpack_tree
from regimen.tasks.environments import VectorEnv
from regimen.tasks.environments.tensor import Corridors, GridWorld, Mazes, TaskPool, TensorEnv, Walk, spanning_tree

UP, RIGHT, DOWN, LEFT = range(4)
ROOM = ["S.#", "#.G"]


class Drift(TensorEnv):
    """A number to which a random one below the action is added; over above 3."""

    observation_space, action_space = spaces.Box(0, 9, (1,)), spaces.Box(0, 2, (1,))

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        return {"place": (seeds % 2).double()[:, None]}

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        place = self.state["place"] + actions * self.uniform()[:, None]
        return {"place": place}, place[:, 0].float(), place[:, 0] > 3, {}

    def observe(self) -> Tensor:
        return self.state["place"]


WORLDS: dict[str, Callable[[int], TensorEnv]] = {
    "drift": partial(Drift, limit=7),
    "grid": partial(GridWorld, lines=ROOM, slip=0.5, limit=9),
    "corridors": Corridors,
    "mazes": partial(Mazes, limit=13),
    "table": partial(Mazes, limit=13, shows_cell=True, pool=3),
}
KNOBS = {"slip": 0.5}


def every(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def begun(env: TensorEnv, seeds: list[int] | None = None, **knobs: float) -> TensorEnv:
    env.reset(every(env.count), torch.tensor(seeds or range(env.count)), {**KNOBS, **knobs})
    return env


def walk(env: TensorEnv, steps: int, rng: torch.Generator, ended: Tensor) -> list[dict[str, Tensor]]:
    """Random steps, with new starts; everything that comes out."""
    out = []
    for _ in range(steps):
        if bool(ended.any()):
            env.reset(ended, torch.randint(1000, (env.count,), generator=rng), KNOBS)
        actions = torch.randint(2, (env.count, *env.action_space.shape), generator=rng)
        change = env.step(actions)
        ended = change.terminated | change.truncated
        seen = change.observations
        told = dict(seen.items()) if isinstance(seen, TensorDict) else {"seen": seen}
        out.append(
            {**told, **change.info, "reward": change.reward, "over": change.terminated, "late": change.truncated}
        )
    return out


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", WORLDS)
def test_resume_is_exact(name: str) -> None:
    env, again, rng = WORLDS[name](5), WORLDS[name](5), torch.Generator().manual_seed(0)
    assert isinstance(env, VectorEnv)
    last = walk(env, 20, rng, every(5))[-1]
    again.load_state_dict(unpack_tree(pack_tree(env.state_dict())))
    other = torch.Generator()
    other.set_state(rng.get_state())
    ended = last["over"] | last["late"]
    assert_same(walk(env, 20, rng, ended), walk(again, 20, other, ended))


@pytest.mark.parametrize("name", WORLDS)
def test_a_state_that_was_given_out_stays_what_it_was(name: str) -> None:
    env = begun(WORLDS[name](4))
    state = env.state_dict()
    before = pack_tree(state)
    walk(env, 20, torch.Generator().manual_seed(0), torch.tensor([True, False, False, False]))
    assert pack_tree(state) == before


@pytest.mark.parametrize("name", WORLDS)
def test_an_episode_is_a_function_of_its_seed_whatever_the_other_copies_do(name: str) -> None:
    many, one = begun(WORLDS[name](3), [5, 6, 7]), begun(WORLDS[name](1), [7])
    many.reset(torch.tensor([False, True, False]), torch.tensor([0, 7, 0]), KNOBS)
    for _ in range(6):
        actions = torch.ones(3, *many.action_space.shape, dtype=torch.int64)
        both, alone = many.step(actions), one.step(actions[:1])
        for row in (1, 2):
            assert torch.equal(both.reward[row], alone.reward[0])
            assert (both.observations[row] == alone.observations[0]).all()


def test_copies_draw_from_streams_of_their_own() -> None:
    env = begun(Drift(2000, limit=9), list(range(2000)))
    first = env.step(torch.ones(2000, 1)).observations - env.seeds[:, None] % 2
    second = env.step(torch.ones(2000, 1)).observations - env.seeds[:, None] % 2 - first
    for drawn in (first, second):
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(drawn.std()) == pytest.approx(12**-0.5, abs=0.02)
    assert abs(float(torch.corrcoef(torch.cat([first, second], 1).T)[0, 1])) < 0.07


@pytest.mark.parametrize("terminates", [False, True])
def test_the_limit_cuts_an_episode_off_or_ends_it(terminates: bool) -> None:
    env = begun(Drift(2, limit=2, limit_terminates=terminates))
    assert not env.step(torch.zeros(2, 1)).truncated.any()
    change = env.step(torch.tensor([[0.0], [1000.0]]))
    assert change.terminated.tolist() == [terminates, True]
    assert change.truncated.tolist() == [not terminates, False]


def test_the_limit_counts_the_steps_of_each_episode() -> None:
    env = begun(Drift(2, limit=3))
    late = []
    for step in range(6):
        if step in (1, 3):
            env.reset(torch.tensor([step == 3, True]), torch.zeros(2, dtype=torch.int64), {})
        late.append(env.step(torch.zeros(2, 1)).truncated.tolist())
    assert late == [[False, False], [False, False], [True, False], [False, False], [False, False], [True, True]]


def test_the_first_reset_starts_every_copy() -> None:
    env = Drift(3, limit=2)
    assert env.reset(torch.tensor([True, False, False]), torch.tensor([0, 1, 1]), {}).flatten().tolist() == [0, 1, 1]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Drift: count=0, limit=5; expected at least 1"):
        Drift(0, limit=5)
    with pytest.raises(ValueError, match="Corridors: corridors=1, length=8; expected at least 2 and 1"):
        Corridors(1, corridors=1)
    with pytest.raises(ValueError, match="Mazes: size is 1, expected at least 2"):
        Mazes(1, size=1)
    with pytest.raises(ValueError, match="TaskPool: size is 0, expected at least 1, or None"):
        TaskPool(lambda seeds: {}, 0)
    for lines in (["SG", "S"], ["S."], ["SG", "x."]):
        with pytest.raises(ValueError, match=r"GridWorld: the drawing is \['S.*of one length, of the letters #.SG"):
            GridWorld(1, lines)


# Pools.


def numbers(size: int | None, seed: int, episodes: int) -> Tensor:
    """The contexts, numbers of their own, that as many episodes draw."""
    return TaskPool(lambda seeds: {"number": seeds}, size, seed).draw(torch.arange(episodes))["number"]


def test_a_pool_draws_each_of_its_contexts_as_often() -> None:
    contexts, counts = numbers(4, 1, 4000).unique(return_counts=True)
    assert len(contexts) == 4
    assert counts.tolist() == pytest.approx([1000] * 4, abs=120)
    assert torch.equal(numbers(4, 1, 4000), numbers(4, 1, 4000))
    assert not set(contexts.tolist()) & set(numbers(4, 2, 4000).tolist())


def test_without_a_size_every_episode_has_a_context_of_its_own() -> None:
    assert numbers(None, 0, 5).tolist() == [0, 1, 2, 3, 4]


# Grids.


def led(env: Walk, *moves: int) -> list[int]:
    return [int(env.step(torch.full((env.count,), move)).info["next_cell"][0]) for move in moves]


def test_walls_and_the_border_leave_one_where_one_is() -> None:
    env = begun(GridWorld(1, ROOM), slip=0.0)
    assert int(env.observe()) == 0
    assert led(env, UP, LEFT, DOWN, RIGHT, RIGHT, DOWN, LEFT, DOWN) == [0, 0, 0, 1, 1, 4, 4, 4]


def test_the_goal_pays_1_and_ends_the_episode() -> None:
    env = begun(GridWorld(2, ROOM), slip=0.0)
    led(env, RIGHT, DOWN)
    change = env.step(torch.tensor([RIGHT, UP]))
    assert change.reward.tolist() == change.info["success"].tolist() == [1, 0]
    assert change.terminated.tolist() == [True, False]
    assert change.info["cell"].tolist() == [4, 4]
    assert change.info["next_cell"].tolist() == change.observations.tolist() == [5, 1]


def test_starts_are_drawn_uniformly() -> None:
    env = begun(GridWorld(4000, ["S.S", "GS."]), list(range(4000)))
    cells, counts = env.observe().unique(return_counts=True)
    assert cells.tolist() == [0, 2, 4]
    assert counts.tolist() == pytest.approx([4000 / 3] * 3, abs=150)


def test_slips_go_in_every_direction_as_often_as_the_knob_says_at_the_reset() -> None:
    """With probability 0.4 a random direction: 0.7 right, 0.1 each of the others."""
    env = begun(GridWorld(4000, ["...", ".S.", "..G"]), list(range(4000)), slip=0.4)
    cells, counts = env.step(torch.full((4000,), RIGHT)).observations.unique(return_counts=True)
    assert cells.tolist() == [1, 3, 5, 7]
    assert (counts / 4000).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.03)
    env.reset(torch.arange(4000) < 2000, torch.arange(4000), {"slip": 0.0})
    assert (env.step(torch.full((4000,), RIGHT)).observations[:2000] == 5).all()
    assert env.state["slip"].unique().tolist() == [0, 0.4]


# Corridors.


def test_corridors_have_the_places_of_the_paper() -> None:
    env = begun(Corridors(1))
    assert env.observation_space == spaces.Discrete(41)
    assert env.action_space == spaces.Discrete(5)
    assert (env.limit, env.limit_terminates) == (10, True)
    assert int(env.observe()) == 0
    assert led(env, 3, 0, 1, 2, 3, 4, 1, 4) == [25, 26, 25, 25, 25, 25, 0, 33]


def test_a_corridor_ends_at_its_last_cell() -> None:
    env = begun(Corridors(1, corridors=2, length=2, seed=0, limit=50))
    goal = int(env.state["goal"][0].nonzero())
    other = {2: 1, 4: 0}[goal]
    first = 1 + 2 * other
    assert led(env, other, 0, 0, 1, 1, 1 - other, 0) == [first, first + 1, first + 1, first, 0, goal - 1, goal]
    assert bool(env.state["goal"][0, env.state["cell"][0]])


def test_one_goal_for_all_episodes_or_one_each() -> None:
    def goals(pool: int | None, seed: int = 0) -> set[int]:
        env = begun(Corridors(200, pool=pool, seed=seed), list(range(200)))
        return set(env.state["goal"].nonzero()[:, 1].tolist())

    assert all(len(goals(1, seed)) == 1 for seed in range(9))
    assert set.union(*(goals(1, seed) for seed in range(40))) == {8, 16, 24, 32, 40}
    assert goals(None) == {8, 16, 24, 32, 40}


def test_corridors_are_over_for_good_after_ten_steps() -> None:
    env = begun(Corridors(1))
    changes = [env.step(torch.tensor([2])) for _ in range(10)]
    assert [bool(change.terminated) for change in changes] == [False] * 9 + [True]
    assert not any(bool(change.truncated) for change in changes)
    assert sum(float(change.reward) for change in changes) == 0


# Mazes.


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (1, 5), (4, 3), (1, 1)])
def test_a_spanning_tree_has_one_way_between_any_two_cells(rows: int, columns: int) -> None:
    for seed in range(20):
        passages = spanning_tree(rows, columns, seed)
        reached, frontier, edges = {0}, [0], 0
        for cell in frontier:
            for move, step in enumerate((-columns, 1, columns, -1)):
                if passages[cell, move]:
                    other = cell + step
                    assert passages[other, (move + 2) % 4]
                    assert abs(other % columns - cell % columns) <= 1
                    edges += 1
                    if other not in reached:
                        reached.add(other)
                        frontier.append(other)
        assert len(reached) == rows * columns
        assert edges == 2 * (rows * columns - 1)


def test_mazes_show_walls_and_the_last_action() -> None:
    env = begun(Mazes(50, pool=None), list(range(50)))
    assert env.observation_space == spaces.Discrete(80)
    for move in (None, UP, RIGHT, DOWN, LEFT, LEFT):
        seen = env.observe() if move is None else env.step(torch.full((50,), move)).observations
        cell = env.state["cell"]
        for copy in range(50):
            passages = spanning_tree(6, 6, copy)
            walls = sum(bit for way, bit in enumerate((8, 4, 2, 1)) if not passages[cell[copy], way])
            assert int(seen[copy]) == 5 * walls + (0 if move is None else move + 1)


def right_hand(walls: int, heading: int) -> int:
    """The move of somebody who keeps a hand on the wall to the right."""
    turns = [(heading + turn) % 4 for turn in (1, 0, 3, 2)]
    return next(move for move in turns if not walls & (8, 4, 2, 1)[move])


def test_keeping_a_hand_on_the_wall_solves_every_maze_from_what_is_seen() -> None:
    env = begun(Mazes(40, limit=200), list(range(100, 140)))
    seen, solved = env.observe(), torch.zeros(40, dtype=torch.bool)
    for _ in range(150):
        moves = torch.tensor([right_hand(int(s) // 5, (int(s) % 5 or 1 + RIGHT) - 1) for s in seen])
        change = env.step(moves)
        seen, solved = change.observations, solved | change.terminated
    assert solved.all()


def test_a_maze_begins_in_one_corner_and_pays_in_the_other() -> None:
    env = begun(Mazes(1, size=2, limit=50), [3])
    rng = torch.Generator().manual_seed(0)
    assert int(env.state["cell"]) == 0
    while True:
        change = env.step(torch.randint(4, (1,), generator=rng))
        assert float(change.reward) == float(change.terminated)
        if change.terminated:
            break
    assert int(change.info["next_cell"]) == 3


def test_a_pool_of_mazes_is_drawn_once() -> None:
    def mazes(env: Mazes, first: int) -> set[bytes]:
        begun(env, list(range(first, first + env.count)))
        return {maze.numpy().tobytes() for maze in env.state["onward"]}

    env = Mazes(300, pool=4, seed=1)
    assert mazes(env, 0) == mazes(env, 1000) == mazes(Mazes(300, pool=4, seed=1), 2000)
    assert len(mazes(env, 0)) == 4
    assert not mazes(env, 0) & mazes(Mazes(300, pool=4, seed=2), 0)
    assert len(mazes(Mazes(300), 0)) > 290


def test_a_judge_may_see_the_cell() -> None:
    plain, table = begun(Mazes(3), [1, 2, 3]), begun(Mazes(3, shows_cell=True), [1, 2, 3])
    assert set(table.observation_space.spaces) == {"sight", "cell"}
    for _ in range(5):
        moves = torch.tensor([RIGHT, DOWN, RIGHT])
        seen, change = plain.step(moves).observations, table.step(moves)
        both: Any = change.observations
        assert torch.equal(both["sight"], seen)
        assert torch.equal(both["cell"], change.info["next_cell"])
