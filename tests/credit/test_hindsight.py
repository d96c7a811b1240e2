"""Values in hindsight, by hand; and a process reward model that learns them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regimen.checkers import check
from regimen.credit import HindsightValues, hindsight_values
from regimen.models import ProcessValue, small_decoder, word_tokenizer
from regimen.objectives import Batch, ValueObjective
from regimen.policies import TokenPolicy
from regimen.rollout import Rollout


def judged(final: Tensor) -> Rollout:
    """Four steps of which the first is a prompt's, and a sample with two."""
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    own = mask & (torch.arange(5) > 0)
    return Rollout.create(
        task="ask", group=torch.arange(2), mask=mask, loss_mask=own, rewards={"correct": final}, reward=final
    )


def test_worked_numbers() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    right = hindsight_values(torch.ones(1), mask, 0.9)
    assert torch.allclose(right, torch.tensor([[0.729, 0.81, 0.9, 1.0]]))
    assert torch.equal(hindsight_values(torch.zeros(1), mask, 0.9), torch.zeros(1, 4))
    assert torch.equal(hindsight_values(torch.full((1,), 0.4), mask, 1.0), torch.full((1, 4), 0.4))
    assert torch.equal(hindsight_values(torch.ones(1), mask, 0.0), torch.tensor([[0.0, 0, 0, 1]]))


@pytest.mark.parametrize("key", ["reward", "correct"])
def test_only_the_policy_s_steps_count(key: str) -> None:
    rollout = HindsightValues(key, 0.5)(judged(torch.tensor([1.0, -2.0])), {}, {})
    expected = torch.tensor([[0, 0.125, 0.25, 0.5, 1.0], [0, -1.0, -2.0, 0, 0]])
    assert torch.allclose(rollout["step_value"], expected)


def test_samples_that_nobody_scored_leave_the_loss() -> None:
    rollout = HindsightValues("correct")(judged(torch.tensor([torch.nan, 1.0])), {}, {})
    assert rollout.loss_mask.any(1).tolist() == [False, True]
    assert bool(rollout["step_value"].isfinite().all())


def test_it_passes_the_checker_of_credits() -> None:
    assert check(HindsightValues(), judged(torch.ones(2))).messages == []


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"discount is 1.5, expected in \[0, 1\]"):
        HindsightValues(discount=1.5)
    with pytest.raises(ValueError, match=r"the reward 'warm' is none \(components: correct\)"):
        HindsightValues("warm")(judged(torch.ones(2)), {}, {})
    steps = judged(torch.ones(2))
    with pytest.raises(ValueError, match=r"of shape \[2, 5\]"):
        HindsightValues()(steps.replace(reward=torch.ones(2, 5)), {}, {})


def texts(policy: TokenPolicy, answers: list[str]) -> Rollout:
    rows = policy.demonstrations(["x"] * len(answers), answers)
    return Rollout.create(task="ask", group=torch.arange(len(answers)), **dict(rows.items()))


def test_a_process_reward_model_learns_which_step_was_wrong() -> None:
    """Texts with a `b` end badly; after that word the value is low, before it nobody knows."""
    tokenizer = word_tokenizer(["a", "b", "x"])
    policy = TokenPolicy(small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=32), tokenizer)
    answers = ["a a a", "a b a", "b a a", "a a b", "a a a", "a a a", "a a a", "b b a"]
    final = torch.tensor([float("b" not in text) for text in answers])
    rollout = HindsightValues("reward", 1.0)(texts(policy, answers).replace(reward=final), {}, {})
    torch.manual_seed(0)
    process = ProcessValue(policy.network, width=32)
    objective = ValueObjective(member="process", target="step_value", aggregate="sequence")
    optimizer = torch.optim.Adam(process.parameters(), 2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        objective(Batch(rollout, {"process": process}, {}, torch.Generator())).total.backward()
        optimizer.step()
    values = process(rollout)
    assert bool((values[0, 4:6] > 0.6).all())
    assert float(values[1, 3].detach()) < 0.2 < float(values[1, 2].detach())
    assert torch.equal(process.last(rollout), values.detach()[:, -1])
    assert all(not name.startswith("_trunk") for name in process.state_dict())
    assert all(isinstance(layer, nn.Linear | nn.ReLU) for layer in process.head)


def test_the_loss_is_a_mean_over_steps_then_over_samples() -> None:
    rollout = HindsightValues("reward", 0.5)(judged(torch.tensor([1.0, -2.0])), {}, {})
    objective = ValueObjective(member="process", target="step_value", aggregate="sequence")
    nothing = lambda rollout: torch.zeros(rollout.mask.shape)  # noqa: E731
    loss = objective(Batch(rollout, {"process": nothing}, {}, torch.Generator())).total
    first = (0.125**2 + 0.25**2 + 0.5**2 + 1) / 4
    assert float(loss) == pytest.approx((first + (1 + 4) / 2) / 2)
