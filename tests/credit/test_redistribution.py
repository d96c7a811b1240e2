"""Redistribution as a part: by whom, of which component, the gate, and what is left as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.credit import GAE, GroupRelativeAdvantage, RewardRedistribution
from regimen.iteration import credit_metrics
from regimen.knobs import Knob, Knobs
from regimen.models.torsos import MLPTorso
from regimen.objectives import Batch, ppo
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.rewards import GroundingReward, OutcomeReward, Scene, judge
from regimen.rollout import Rollout

PLAIN = GAE(1.0, normalize=None)
CRITIC = {"critic": lambda rollout: torch.zeros(rollout.mask.shape)}


class Says:
    """An estimator that says given numbers, and how far off it is."""

    def __init__(self, said: Any, misfit: float = 0.0) -> None:
        self.said, self.misfit = torch.as_tensor(said), torch.tensor(misfit)

    def __call__(self, rollout: Rollout) -> Tensor:
        return self.said


def episodes(paid: Any, valid: Any = None, **fields: Any) -> Rollout:
    """Judged by the outcome, and a penalty at 0.5 where it is told what was valid."""
    env_reward = torch.as_tensor(paid)
    mask = fields.pop("mask", torch.ones_like(env_reward, dtype=torch.bool))
    columns = {"env_reward": env_reward} | ({} if valid is None else {"valid": torch.as_tensor(valid)})
    group = fields.pop("group", torch.zeros(len(mask), dtype=torch.int64))
    rollout = Rollout.create(task="walk", group=group, mask=mask, step_columns=columns, **fields)
    reward = OutcomeReward() if valid is None else 2 * OutcomeReward() + 0.5 * GroundingReward()
    return judge(reward, rollout, Scene(knobs={"weight/outcome": 2.0, "weight/grounding": 0.5}))[0]


def returns(credit: RewardRedistribution, rollout: Rollout, cast: Any = None, **knobs: float) -> Tensor:
    """Undiscounted sums of what is paid from each step on."""
    cast = CRITIC | (cast or {})
    advantages = credit(rollout, {"alpha": 1.0} | knobs, cast).advantages
    assert advantages is not None
    return advantages


def test_contributions_take_the_place_of_the_final_reward() -> None:
    rollout = episodes([[0.0, 0.0, 1.0]])
    estimator = Says([[0.5, 0.3, 0.2]])
    found = returns(RewardRedistribution(inner=PLAIN), rollout, {"estimator": estimator})
    assert torch.allclose(found, torch.tensor([[1.0, 0.5, 0.2]]))


def test_what_was_judged_is_left_as_it_was() -> None:
    rollout = episodes([[0.0, 0.0, 1.0]])
    credited = RewardRedistribution("uniform", inner=PLAIN)(rollout, {"alpha": 1.0}, CRITIC)
    assert torch.equal(credited.reward, rollout.reward)
    assert torch.allclose(credited["contributions"], torch.full((1, 3), 1 / 3))


def test_other_components_stay_and_the_final_one_has_its_weight() -> None:
    rollout = episodes([[0.0, 1.0]], valid=[[0.0, 1.0]])
    credit = RewardRedistribution("uniform", final="outcome", inner=PLAIN)
    found = returns(credit, rollout, **{"weight/outcome": 2.0})
    assert torch.allclose(found, torch.tensor([[1 - 0.5 + 1, 1.0]]))


def test_without_contributions_there_is_no_reward_and_no_gradient_for_the_policy() -> None:
    observations, actions = torch.randn(2, 3, 4), torch.randint(2, (2, 3))
    policy = ActionPolicy(MLPTorso(4, (8,)), CategoricalHead(8, 2))
    rollout = episodes(torch.rand(2, 3), observations=observations, actions=actions, knobs={"temperature": 1.0})
    rollout = rollout.replace(logprobs=policy.logprob(rollout).detach())
    credit = RewardRedistribution("uniform", alpha=0.0, inner=GAE(1.0, normalize="batch"))
    credited = credit(rollout, {"alpha": 0.0}, CRITIC)
    assert torch.equal(credited.advantages, torch.zeros(2, 3))
    objective = next(iter(ppo().leaves()))
    objective(Batch(credited, {"policy": policy}, {}, torch.Generator())).total.backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in policy.parameters())


def test_with_one_step_an_exact_estimator_is_the_final_reward() -> None:
    rollout = episodes([[1.0], [0.25]])
    found = RewardRedistribution()(rollout, {"alpha": 1.0}, CRITIC | {"estimator": Says([[1.0], [0.25]])})
    plain = GAE()(rollout, {}, CRITIC)
    assert torch.equal(found.advantages, plain.advantages)
    assert torch.equal(found["value_target"], plain["value_target"])


def test_siblings_are_compared_and_others_are_not() -> None:
    rollout = episodes([[0.0, 1.0], [0.0, 0.0], [0.0, 5.0]], group=torch.tensor([0, 0, 1]))
    found = RewardRedistribution("leave_one_out", inner=PLAIN)(rollout, {"alpha": 1.0}, CRITIC)
    assert found["contributions"].tolist() == [[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]


def test_the_weights_of_the_published_code_can_be_had() -> None:
    rollout, estimator = episodes([[0.0, 0.0, 0.0, 1.0]]), {"estimator": Says([[0.6, 0.8, 0.0, 0.9]])}
    found = returns(RewardRedistribution(inner=PLAIN, step_weight="remaining_actions"), rollout, estimator)
    assert torch.allclose(found, torch.tensor([[3.4, 1.6, 0.0, 0.0]]))


def test_padding_is_paid_nothing() -> None:
    mask = torch.tensor([[True, True, False]])
    rollout = episodes([[0.0, 1.0, 9.0]], mask=mask)
    found = returns(RewardRedistribution(inner=PLAIN), rollout, {"estimator": Says([[0.5, 0.5, 7.0]])})
    assert torch.allclose(found, torch.tensor([[1.0, 0.5, 0.0]]))


def test_a_sample_that_could_not_be_judged_is_paid_nothing() -> None:
    rollout = episodes([[0.0, 1.0], [torch.nan, 1.0]])
    assert rollout.loss_mask.tolist() == [[True, True], [False, False]]
    for final in (None, "outcome"):
        found = RewardRedistribution("uniform", final=final, inner=PLAIN)(rollout, {"alpha": 1.0}, CRITIC)
        assert found["contributions"].tolist() == [[0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("misfit", [0.6, torch.inf, torch.nan])
def test_an_estimator_that_fits_badly_is_not_followed(misfit: float) -> None:
    rollout, cast = episodes([[0.0, 1.0]]), {"estimator": Says([[0.9, 0.1]], misfit)}
    credit = RewardRedistribution(inner=GAE(0.0, normalize=None), fallback=PLAIN)
    with pytest.warns(UserWarning, match="the misfit of 'estimator' is .* above the gate of 0.5; the reward is not"):
        found = returns(credit, rollout, cast)
    assert found.tolist() == [[1.0, 1.0]]


def test_the_log_says_whether_the_gate_was_open() -> None:
    rollout = episodes([[0.0, 1.0]])
    for misfit, expected in ((0.1, 1.0), (0.6, 0.0)):
        credit, cast = (
            RewardRedistribution(inner=PLAIN, fallback=PLAIN),
            CRITIC | {"estimator": Says([[0.75, 0.25]], misfit)},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            credited = credit(rollout, {"alpha": 1.0}, cast)
        logged = credit_metrics(rollout, credited)
        assert logged["credit/redistributed"] == expected
        assert logged.get("credit/contributions", 0.5) == pytest.approx(0.5)


def test_the_gate_is_passed_by_a_good_fit_and_by_one_who_tells_nothing() -> None:
    rollout = episodes([[0.0, 1.0]])
    for estimator in (Says([[0.75, 0.25]], 0.5), lambda rollout: torch.tensor([[0.75, 0.25]])):
        found = returns(RewardRedistribution(inner=PLAIN, fallback=PLAIN), rollout, {"estimator": estimator})
        assert found.tolist() == [[1.0, 0.25]]


def test_alpha_may_be_moved() -> None:
    credit = RewardRedistribution("uniform", alpha=Knob("trust", 1.0), inner=PLAIN)
    assert [knob.name for knob in credit.knobs] == ["trust"]
    assert returns(credit, episodes([[0.0, 1.0]]), trust=0.5).tolist() == [[0.5, 0.25]]


def test_it_passes_the_checks_of_a_credit() -> None:
    assert check(RewardRedistribution("uniform", inner=GroupRelativeAdvantage())).messages == []


@pytest.mark.parametrize(
    ("credit", "cast", "message"),
    [
        (RewardRedistribution(), {}, "needs the member 'estimator', which the cast lacks"),
        (RewardRedistribution(), {"estimator": Says([[1.0]])}, r"gave shape \[1, 1\], expected \[1, 2\]"),
        (RewardRedistribution("uniform", final="won"), {}, r"no component 'won' \(it has: outcome\)"),
    ],
)
def test_what_is_missing_is_named(credit: RewardRedistribution, cast: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        credit(episodes([[0.0, 1.0]]), {"alpha": 1.0}, CRITIC | cast)


def test_a_component_whose_weight_is_not_told_is_an_error() -> None:
    credit, rollout = RewardRedistribution("uniform", final="outcome"), episodes([[0.0, 1.0]], valid=[[1.0, 1.0]])
    with pytest.raises(ValueError, match="no knob 'weight/outcome' says how component 'outcome' entered the total"):
        credit(rollout, {"alpha": 1.0}, CRITIC)


def test_a_rollout_without_reward_is_an_error() -> None:
    rollout = Rollout.create(task="a", group=torch.arange(1), mask=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="the rollout has no reward"):
        RewardRedistribution("uniform")(rollout, {"alpha": 1.0}, {})


@pytest.mark.parametrize("settings", [{"gate": -1.0}, {"gate": torch.nan}, {"step_weight": "later"}])
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="RewardRedistribution: gate is"):
        RewardRedistribution(**settings)


def test_knobs_of_both_credits_are_declared_once() -> None:
    discounted = GAE(discount=Knob("discount", 0.9))
    board = Knobs.of(RewardRedistribution(inner=discounted, fallback=discounted))
    assert dict(board) == {"alpha": 1.0, "discount": 0.9}
