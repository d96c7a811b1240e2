"""Temporal differences: worked targets, terminations and cuts, the discount in force, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from off_policy import Line, Says, batch_of, numerical_gradient, steps
from torch import Tensor, nn

from regimen.checkers import check
from regimen.knobs import Knob, Knobs
from regimen.memory import ReplayMemory
from regimen.models import Temperature, ValueNetwork
from regimen.models.torsos import MLPTorso
from regimen.objectives import TDObjective, td_loss
from regimen.rollout import Rollout


def members(**others: Any) -> dict[str, Any]:
    return {"critic": Line(0.0, 1.0), "critic_target": Line(5.0, 2.0), "policy": Says(), **others}


def target_of(objective: TDObjective, rollout: Rollout, cast: dict[str, Any]) -> list[float]:
    """The target of each step, read off the loss of a critic whose values are 0: its squares, one step at a time."""
    zero = Line(0.0, slope=0.0)
    silent = rollout.replace(actions=torch.zeros_like(rollout.actions))
    found = []
    for row in range(len(rollout)):
        loss = objective(batch_of(objective, silent[row], **{**cast, "critic": zero})).total
        found.append(float(loss.detach()) ** 0.5)
    return found


def test_a_termination_has_no_value_after_it_and_a_cut_has() -> None:
    """The target proposes 2 s' and the target critics say s' + 2 s' + 5 or + 2, of which the least counts."""
    expected = [0.1 + 0.5 * (10 + 20 + 2), 0.2, 0.3 + 0.5 * (30 + 60 + 2)]
    assert target_of(TDObjective(), steps(), members()) == pytest.approx(expected)


def test_entropy_is_part_of_the_value_after() -> None:
    """The log-probability is -3 + 0.5 * 2 = -2."""
    expected = [0.1 + 0.5 * (32 + 0.2 * 2), 0.2, 0.3 + 0.5 * (92 + 0.2 * 2)]
    assert target_of(TDObjective(entropy_weight=0.2), steps(), members()) == pytest.approx(expected)
    learned = members(temperature=Temperature(0.2))
    assert target_of(TDObjective(entropy_weight="temperature"), steps(), learned) == pytest.approx(expected)


def test_without_weight_entropy_is_no_matter() -> None:
    silent = members(policy=Says(logprob=None))
    assert target_of(TDObjective(), steps(), silent) == pytest.approx(target_of(TDObjective(), steps(), members()))
    with pytest.raises(ValueError, match="proposes actions without log-probabilities; use entropy_weight=0"):
        target_of(TDObjective(entropy_weight=0.1), steps(), silent)


def test_each_task_has_its_own_temperature() -> None:
    other = steps().replace(task=torch.ones(3, dtype=torch.int64))
    both = Rollout(torch.cat([steps().data, other.data]), ("a", "b"))
    temperature = Temperature(1.0, tasks=("b", "a"))
    with torch.no_grad():
        temperature.log.copy_(torch.tensor([0.5, 0.25]).log())
    found = target_of(TDObjective(entropy_weight="temperature"), both, members(temperature=temperature))
    assert found[0] == pytest.approx(0.1 + 0.5 * (32 + 0.25 * 2), rel=1e-6)
    assert found[3] == pytest.approx(0.1 + 0.5 * (32 + 0.5 * 2), rel=1e-6)


def test_without_a_policy_the_target_values_states() -> None:
    value = ValueNetwork(MLPTorso(1, ()))
    with torch.no_grad():
        value.out.weight.fill_(2.0)
    found = target_of(TDObjective(target="value", policy=None), steps(), {"value": value})
    assert found == pytest.approx([0.1 + 0.5 * 20, 0.2, 0.3 + 0.5 * 60])


def test_loss_is_the_mean_over_steps_of_the_sum_over_critics() -> None:
    loss = TDObjective()(batch_of(TDObjective(), steps(), **members()))
    targets = torch.tensor([16.1, 0.2, 46.3], dtype=torch.float64)
    values = torch.tensor([[1.5, 2.25, 3.0], [2.5, 3.25, 4.0]], dtype=torch.float64)
    assert float(loss.total.detach()) == pytest.approx(float((values - targets).square().sum(0).mean()))
    assert float(loss.metrics["q_mean"]) == pytest.approx(float(values.mean()))
    assert float(loss.metrics["td_error"]) == pytest.approx(float((values - targets).abs().mean()))


def test_distances_by_hand() -> None:
    values, target = torch.tensor([[1.0, 4.0], [2.0, 0.0]]), torch.tensor([2.0, 1.0])
    assert td_loss(values, target).tolist() == [1 + 0, 9 + 1]
    assert td_loss(values, target, "huber", delta=1.0).tolist() == [0.5, 2.5 + 0.5]
    # A wide one is half the square.
    assert torch.allclose(td_loss(values, target, "huber", delta=20.0), td_loss(values, target) / 2)


def test_gradient_is_that_of_the_critic_with_the_target_held() -> None:
    cast = members()
    objective = TDObjective(entropy_weight=0.3)
    loss = objective(batch_of(objective, steps(), **cast)).total
    loss.backward()
    parameters = list(cast["critic"].parameters())
    expected = numerical_gradient(lambda: objective(batch_of(objective, steps(), **cast)).total, parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)
    for name in ("critic_target", "policy"):
        assert all(parameter.grad is None for parameter in cast[name].parameters()), name


def walk(length: int = 5, cut: int | None = None, n_columns: bool = True) -> Rollout:
    """One sample of `length` steps that observe and earn their number; after a cut the observations jump by 100."""
    number = torch.arange(length, dtype=torch.float64)[None]
    at = torch.zeros(1, length, dtype=torch.bool)
    if cut is not None:
        at[0, cut] = True
    return Rollout.create(
        task="t", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, length, dtype=torch.bool),
        observations=number[..., None], actions=0 * number[..., None], reward=number, discount=0.5 + 0 * number,
        step_columns={"next_observations": (number + 1 + 100 * at)[..., None], "cut": at},
    )  # fmt: skip


def n_step_targets(rollout: Rollout, n: int, **settings: Any) -> list[float]:
    """The value after is what is observed there."""
    objective = TDObjective(n=n, **settings)
    cast = {"critic": Line(0.0, slope=0.0), "critic_target": Line(0.0), "policy": Says(0.0)}
    found = []
    for step in range(rollout.steps):
        only = torch.zeros_like(rollout.mask)
        only[0, step] = True
        loss = objective(batch_of(objective, rollout.replace(loss_mask=only), **cast)).total
        found.append(float(loss.detach()) ** 0.5)
    return found


def test_n_step_targets_by_hand() -> None:
    """`r + r' / 2 + r'' / 4 + s''' / 8`; fewer at the end, where what came after the last step counts."""
    expected = [0 + 0.5 + 0.5 + 3 / 8, 1 + 1 + 0.75 + 4 / 8, 2 + 1.5 + 1 + 5 / 8, 3 + 2 + 5 / 4, 4 + 5 / 2]
    assert n_step_targets(walk(), 3) == pytest.approx(expected)


def test_n_step_targets_stop_at_a_cut_with_what_came_after_it() -> None:
    expected = [0 + 0.5 + 102 / 4, 1 + 102 / 2, 2 + 1.5 + 1 + 5 / 8, 3 + 2 + 5 / 4, 4 + 5 / 2]
    assert n_step_targets(walk(cut=1), 3) == pytest.approx(expected)


def test_replayed_steps_have_the_targets_of_their_trajectory() -> None:
    """What a trajectory gives step by step, its transitions give when they are drawn with the steps ahead."""
    memory, rollout = ReplayMemory(9, "transition", ahead=2), walk(cut=1)
    memory.add(rollout)
    drawn = memory.sample(40, torch.Generator().manual_seed(0))
    objective = TDObjective(n=3)
    cast = {"critic": Line(0.0, slope=0.0), "critic_target": Line(0.0), "policy": Says(0.0)}
    expected = n_step_targets(rollout, 3)
    for row in range(40):
        loss = objective(batch_of(objective, drawn[row], **cast)).total
        assert float(loss.detach()) ** 0.5 == pytest.approx(expected[int(drawn.observations[row, 0, 0])])


def test_a_moved_discount_holds_for_what_is_replayed() -> None:
    memory = ReplayMemory(9, "transition")
    memory.add(steps(discount=torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)))
    drawn = memory.sample(30, torch.Generator().manual_seed(0))
    objective = TDObjective(discount=Knob("discount", 0.5, 0, 1))
    knobs = Knobs.of(objective)
    halved = drawn.replace(discount=drawn.discount / 2)
    expected = TDObjective()(batch_of(TDObjective(), halved, **members())).total.detach()
    loss = objective(batch_of(objective, drawn, knobs=knobs, **members())).total
    assert float(loss.detach()) == pytest.approx(float(expected))
    knobs.set("discount", 0.0, by="a test")
    loss = objective(batch_of(objective, drawn, knobs=knobs, **{**members(), "critic": Line(0.0, slope=0.0)})).total
    expected = (drawn.reward - drawn.actions[..., 0]).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected))


def test_two_discounts_are_refused() -> None:
    objective = TDObjective(discount=0.9)
    assert [knob.name for knob in objective.knobs] == ["discount"]
    expected = (
        r"TDObjective multiplies by the knob 'discount', .* task t already holds a discount of 0.5; .*discount=None"
    )
    with pytest.raises(ValueError, match=expected):
        objective(batch_of(objective, steps(), **members()))


def test_a_recorded_discount_that_has_moved_is_refused() -> None:
    rollout = steps(knobs={"discount": 0.5})
    objective = TDObjective()
    objective(batch_of(objective, rollout, knobs={"discount": 0.5}, **members()))
    with pytest.raises(
        ValueError, match=r"taken under other values of the knob 'discount' than 0.9, .*EnvTask\(discount="
    ):
        objective(batch_of(objective, rollout, knobs={"discount": 0.9}, **members()))


def test_more_steps_than_there_are_is_refused() -> None:
    objective = TDObjective(n=3)
    over = steps().replace(discount=torch.zeros(3, 1, dtype=torch.float64))
    objective(batch_of(objective, over, **members()))
    with pytest.raises(ValueError, match=r"TDObjective sums 3 rewards, .* 1 steps and go on; draw more .*ahead=2"):
        objective(batch_of(objective, steps(), **members()))


def test_errors_say_what_is_missing() -> None:
    bare = steps()
    bare = Rollout(bare.data.exclude("reward"), bare.task_names)
    with pytest.raises(ValueError, match="TDObjective needs 'reward', .* give the stage a reward that trains"):
        TDObjective()(batch_of(TDObjective(), bare, **members()))
    with pytest.raises(KeyError, match="the cast has no member 'critic_target'; it has: policy"):
        TDObjective()(batch_of(TDObjective(), steps(), policy=Says()))
    with pytest.raises(ValueError, match=r"td_loss: values \[2\], target \[2\], distance 'mse', delta=1"):
        td_loss(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"distance 'l1', delta=1.0; expected \[K, R\] and \[R\], one of mse, huber"):
        td_loss(torch.zeros(1, 2), torch.zeros(2), "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Temperature has one for each of b, none for t"):
        objective = TDObjective(entropy_weight="temperature")
        objective(batch_of(objective, steps(), **members(temperature=Temperature(tasks=["b"]))))
    with pytest.raises(ValueError, match="Temperature: initial is 0, expected above 0"):
        Temperature(0)


@pytest.mark.parametrize("objective", [TDObjective(), TDObjective(entropy_weight=0.1, distance="huber", n=1)])
def test_objective_passes_the_checker(objective: TDObjective) -> None:
    cast: dict[str, nn.Module] = members()
    cast["critic_target"].requires_grad_(False)
    rollout = Rollout(torch.cat([steps().data] * 2), ("t",))
    assert check(objective, rollout, cast=cast).messages == []
    assert replace(objective, name="other").term_name == "other"


def test_tables_of_observations_are_read_as_they_are() -> None:
    class Reader(Line):
        def forward(self, observations: Any, actions: Tensor) -> Tensor:
            return super().forward(observations["place"], actions)

    class Speaker(Says):
        def propose(self, observations: Any, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
            return super().propose(observations["place"], rng)

    plain = steps()
    columns = {"next_observations": {"place": plain["next_observations"]}, "cut": plain["cut"]}
    rollout = steps(observations={"place": plain.observations}, step_columns=columns)
    cast = {"critic": Reader(0.0, 1.0), "critic_target": Reader(5.0, 2.0), "policy": Speaker()}
    expected = TDObjective()(batch_of(TDObjective(), plain, **members())).total.detach()
    found = TDObjective()(batch_of(TDObjective(), rollout, **cast)).total.detach()
    assert float(found) == pytest.approx(float(expected))
