"""Returns along the steps: worked numbers, limiting cases, and a plain loop that says the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regimen.functions.returns import (
    discounted_return,
    gae,
    n_step_last,
    n_step_return,
    n_step_target,
    on_last_step,
    vtrace,
)


def rows(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


@pytest.fixture
def episodes() -> dict[str, Tensor]:
    """Ragged samples with padding that holds nonsense, steps that nobody decided, cuts and terminations."""
    rng = torch.Generator().manual_seed(0)
    batch, steps = 16, 13
    lengths = torch.randint(1, steps + 1, (batch,), generator=rng)
    mask = torch.arange(steps) < lengths[:, None]
    draw = torch.rand(batch, steps, generator=rng, dtype=torch.float64)

    def noise() -> Tensor:
        return torch.where(mask, torch.randn(batch, steps, generator=rng, dtype=torch.float64), torch.nan)

    return {
        "rewards": noise(),
        "values": noise(),
        "discount": torch.where(draw < 0.15, 0.0, 0.9 + 0.1 * draw),
        "ratio": noise().exp(),
        "mask": mask,
        "decided": (draw * 7 % 1 > 0.3) & mask,
        "cut": (draw * 11 % 1 < 0.2) & mask,
        "bootstrap": torch.randn(batch, steps, generator=rng, dtype=torch.float64),
    }


def plain_loop(e: dict[str, Tensor], lam: float, rho: float | None = None) -> tuple[Tensor, Tensor]:
    """GAE, or V-trace with clips `rho`, one step of one sample at a time from the last to the first."""
    advantages, targets = torch.zeros_like(e["discount"]), torch.zeros_like(e["discount"])
    steps = e["mask"].shape[1]
    for b in range(len(advantages)):
        value, target = e["bootstrap"][b, -1], e["bootstrap"][b, -1]
        gained = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(steps)):
            if not e["mask"][b, t]:
                continue
            if e["cut"][b, t]:
                value = target = e["bootstrap"][b, t]
                gained = torch.zeros((), dtype=torch.float64)
            reward, discount = e["rewards"][b, t], e["discount"][b, t]
            if not e["decided"][b, t]:
                value, target = reward + discount * value, reward + discount * target
                continue
            here = e["values"][b, t]
            ratio = torch.ones(()) if rho is None else e["ratio"][b, t]
            clipped = ratio if rho is None else ratio.clamp(max=rho)
            error = clipped * (reward + discount * value - here)
            gained = error + discount * lam * clipped * (target - value)
            advantages[b, t] = gained if rho is None else clipped * (reward + discount * target - here)
            value, target = here, here + gained
            targets[b, t] = target
    return advantages, targets


def test_cross_view_example() -> None:
    """The worked example of a fragment that ends (discount .999, lambda .95)."""
    advantages, targets = gae(rows(0, 0, 1), rows(0.2, 0.4, 0.6), rows(0.999, 0.999, 0), 0.95)
    assert close(advantages, rows(0.749119, 0.57902, 0.4), 1e-6)
    assert close(targets, advantages + rows(0.2, 0.4, 0.6))


@pytest.mark.parametrize(
    ("lam", "rewards", "expected"),
    [
        (1.0, (0, 0, 0.65), (0.15, 0.10, 0.05)),
        (0.95, (0, 0, 0.65), (0.142625, 0.0975, 0.05)),
        (1.0, (-0.01, -0.005, 0.63), (0.115, 0.075, 0.03)),
    ],
)
def test_terminal_reward_example(lam: float, rewards: tuple[float, ...], expected: tuple[float, ...]) -> None:
    advantages, _ = gae(rows(*rewards), rows(0.5, 0.55, 0.6), ones(1, 3), lam)
    assert close(advantages, rows(*expected))


def test_step_reward_example() -> None:
    values = rows(0.5, 0.4, 0.3, 0.2)
    assert close(gae(rows(0.6, 0.8, 0, 0.9), values, ones(1, 4), 0.95)[0], rows(1.6749125, 1.23675, 0.565, 0.7))
    assert close(gae(rows(0, 0, 0, 1), values, ones(1, 4), 0.95)[0], rows(0.40065, 0.527, 0.66, 0.8))


def test_full_lambda_is_monte_carlo_minus_value(episodes: dict[str, Tensor]) -> None:
    e = {**episodes, "bootstrap": episodes["bootstrap"][:, 0]}
    advantages, targets = gae(e["rewards"], e["values"], e["discount"], 1.0, e["mask"], e["bootstrap"])
    returns = discounted_return(e["rewards"], e["discount"], e["mask"], e["bootstrap"])
    assert close(targets, returns)
    assert close(advantages[e["mask"]], (returns - e["values"])[e["mask"]])
    assert (advantages[~e["mask"]] == 0).all()


def test_zero_lambda_is_the_temporal_difference() -> None:
    advantages, _ = gae(rows(1, 2, 3), rows(10, 20, 30), rows(0.5, 0.5, 0.5), 0.0, bootstrap=torch.tensor([40.0]))
    assert close(advantages, rows(1 + 10 - 10, 2 + 15 - 20, 3 + 20 - 30))


def test_zero_discount_cuts() -> None:
    """What happens after a termination changes nothing before it."""
    discount = rows(0.9, 0, 0.9, 0.9)
    a, _ = gae(rows(1, 2, 3, 4), rows(0.5, 0.5, 0.5, 0.5), discount, 0.95)
    b, _ = gae(rows(1, 2, -7, 9), rows(0.5, 0.5, 8, 9), discount, 0.95)
    assert close(a[:, :2], b[:, :2])
    assert float(a[0, 1]) == 1.5


def test_bootstrap_at_the_end_passes_through_padding() -> None:
    """A short sample in a long row is as it is in a short row."""
    short, _ = gae(rows(1, 2), rows(3, 4), rows(0.9, 0.9), 0.8, bootstrap=torch.tensor([5.0]))
    mask = torch.tensor([[True, True, False, False]])
    row, _ = gae(
        rows(1, 2, torch.nan, 7), rows(3, 4, 9, torch.nan), rows(0.9, 0.9, 0, 0), 0.8, mask, torch.tensor([5.0])
    )
    assert close(row, torch.cat([short, torch.zeros(1, 2)], 1))
    assert close(short[:, 1], torch.tensor([2 + 0.9 * 5 - 4]).double())


def test_cut_inside_a_row_is_two_samples() -> None:
    """An environment reset at its time limit: the value continues, the row does not."""
    rewards, values, discount = rows(1, 2, 3, 4), rows(5, 6, 7, 8), rows(0.9, 0.9, 0.9, 0)
    cut = torch.tensor([[False, True, False, False]])
    bootstrap = rows(0, 11, 0, 0)
    both, _ = gae(rewards, values, discount, 0.7, bootstrap=bootstrap, cut=cut)
    first, _ = gae(rewards[:, :2], values[:, :2], discount[:, :2], 0.7, bootstrap=torch.tensor([11.0]))
    second, _ = gae(rewards[:, 2:], values[:, 2:], discount[:, 2:], 0.7)
    assert close(both, torch.cat([first, second], 1))


def test_steps_nobody_decided_are_passed_through() -> None:
    """Their rewards and discounts count; the result is that of the sample without them."""
    decided = torch.tensor([[True, False, False, True]])
    advantages, targets = gae(rows(1, 2, 3, 4), rows(5, 99, torch.nan, 8), rows(0.9, 0.8, 0.7, 0), 0.6, decided=decided)
    merged, _ = gae(rows(1 + 0.9 * (2 + 0.8 * 3), 4), rows(5, 8), rows(0.9 * 0.8 * 0.7, 0), 0.6)
    # lambda counts decisions, not steps
    assert close(advantages[:, [0, 3]], merged)
    assert close(targets[:, 1:3], torch.zeros(1, 2).double())


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95, 1.0])
def test_gae_is_the_plain_loop(episodes: dict[str, Tensor], lam: float) -> None:
    e = episodes
    found = gae(
        e["rewards"], e["values"], e["discount"], lam, e["mask"], e["bootstrap"], cut=e["cut"], decided=e["decided"]
    )
    for got, expected in zip(found, plain_loop(e, lam), strict=True):
        assert close(got, expected)


@pytest.mark.parametrize("clip", [0.5, 1.0, 3.0])
def test_vtrace_is_the_plain_loop(episodes: dict[str, Tensor], clip: float) -> None:
    e = episodes
    found = vtrace(
        e["rewards"], e["values"], e["discount"], e["ratio"], e["mask"], e["bootstrap"], lam=0.9, clip_rho=clip,
        clip_c=clip, cut=e["cut"], decided=e["decided"],
    )  # fmt: skip
    for got, expected in zip(found, plain_loop(e, 0.9, clip), strict=True):
        assert close(got, expected)


def test_vtrace_on_policy_is_gae(episodes: dict[str, Tensor]) -> None:
    e = episodes
    arguments = e["rewards"], e["values"], e["discount"]
    _, corrected = vtrace(*arguments, torch.ones_like(e["ratio"]), e["mask"], lam=0.8)
    assert close(corrected, gae(*arguments, 0.8, e["mask"])[1])


def test_vtrace_by_hand() -> None:
    """Two steps, discount 1, ratios 2 (clipped to 1) and 0.5, values 1 and 2, rewards 0 and 3."""
    advantages, targets = vtrace(rows(0, 3), rows(1, 2), rows(1, 0), rows(2, 0.5))
    # v_2 = 2 + 0.5 (3 - 2) = 2.5; v_1 = 1 + 1 (0 + 2 - 1) + 1 (2.5 - 2) = 2.5
    assert close(targets, rows(2.5, 2.5))
    assert close(advantages, rows(0 + 2.5 - 1, 0.5 * (3 - 2)))


def test_return_by_hand() -> None:
    returns = discounted_return(rows(1, 2, 3), rows(0.5, 0.5, 0.5), bootstrap=torch.tensor([8.0]))
    assert close(returns, rows(1 + 0.5 * 5.5, 2 + 0.5 * 7, 3 + 0.5 * 8))


def test_terminal_reward_is_exact() -> None:
    """With discount 1 a reward at the end reaches every step unchanged, to the last bit."""
    total = torch.tensor([0.1, 0.7])
    mask = torch.tensor([[True] * 100, [True] * 37 + [False] * 63])
    returns = discounted_return(on_last_step(total, mask), torch.ones(2, 100), mask)
    assert torch.equal(returns, total[:, None] * mask)


def test_on_last_step_skips_gaps_and_padding() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])
    assert torch.equal(on_last_step(torch.tensor([5.0, 7.0]), mask), torch.tensor([[0, 0, 5.0, 0], [0, 0, 0, 0]]))


def test_n_step_by_hand() -> None:
    total, factor = n_step_return(rows(1, 2, 3), rows(0.5, 0.5, 0.5), 3)
    assert close(total, rows(2.75, 3.5, 3))
    assert close(factor, rows(0.125, 0.25, 0.5))


def test_n_step_stops_at_a_termination() -> None:
    total, factor = n_step_return(rows(1, 2, 3, 4), rows(1, 0, 1, 1), 3)
    assert close(total, rows(3, 2, 7, 4))
    assert close(factor, rows(0, 0, 1, 1))


def test_n_step_target_limits(episodes: dict[str, Tensor]) -> None:
    """One step is the temporal-difference target, all steps the return."""
    e = {**episodes, "bootstrap": episodes["bootstrap"][:, 0]}
    rest = e["mask"], e["bootstrap"]
    one = n_step_target(e["rewards"], e["values"], e["discount"], 1, *rest)
    assert close(one, gae(e["rewards"], e["values"], e["discount"], 0.0, *rest)[1])
    for n in (13, 50):
        every = n_step_target(e["rewards"], e["values"], e["discount"], n, *rest)
        assert close(every, discounted_return(e["rewards"], e["discount"], *rest))


def test_n_step_target_by_hand() -> None:
    target = n_step_target(rows(1, 2, 3), rows(10, 20, 30), rows(0.5, 0.5, 0.5), 2, bootstrap=torch.tensor([40.0]))
    assert close(target, rows(1 + 0.5 * 2 + 0.25 * 30, 2 + 0.5 * 3 + 0.25 * 40, 3 + 0.5 * 40))


def test_n_step_sums_end_at_a_cut_and_keep_the_discount_of_what_comes_after_it() -> None:
    rewards, cut = rows(1, 2, 4, 8, 16), torch.tensor([[False, True, False, False, True]])
    total, factor = n_step_return(rewards, 0.5 * ones(1, 5), 3, cut=cut)
    assert total.tolist() == [[1 + 1, 2, 4 + 4 + 4, 8 + 8, 16]]
    assert factor.tolist() == [[0.25, 0.5, 0.125, 0.25, 0.5]]
    assert n_step_last(3, torch.ones_like(cut), cut).tolist() == [[1, 1, 4, 4, 4]]


def test_a_cut_row_is_two_rows(episodes: dict[str, Tensor]) -> None:
    rewards, discount = (episodes[name].nan_to_num() for name in ("rewards", "discount"))
    cut = torch.zeros_like(episodes["mask"])
    cut[:, 5] = True
    whole = n_step_return(rewards, discount, 4, cut=cut)
    apart = [n_step_return(rewards[:, part], discount[:, part], 4) for part in (slice(0, 6), slice(6, None))]
    for found, first, second in zip(whole, *apart, strict=True):
        assert close(found, torch.cat([first, second], 1))


def test_last_step_of_a_sum_stays_in_its_sample() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert n_step_last(1, mask).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert n_step_last(2, mask).tolist() == [[1, 2, 2, 3], [1, 2, 3, 3]]
    assert n_step_last(9, mask).tolist() == [[2, 2, 2, 3], [3, 3, 3, 3]]


@pytest.mark.parametrize("steps", [1, 2, 3, 64, 65])
def test_any_number_of_steps(steps: int) -> None:
    returns = discounted_return(ones(2, steps), 0.5 * ones(2, steps))
    expected = 2 * (1 - 0.5 ** torch.arange(steps, 0, -1, dtype=torch.float64))
    assert close(returns, expected.expand(2, -1))


def test_differentiable_in_rewards() -> None:
    """A reward model may be trained through the return (look-ahead objectives)."""
    rewards = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    discounted_return(rewards, rows(0.5, 0.5, 0.5))[0, 0].backward()
    assert rewards.grad is not None
    assert close(rewards.grad, rows(1, 0.5, 0.25))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: gae(r, r[:, :2], r, 0.9), r"gae: values has shape \[1, 2\], expected \[1, 3\]"),
        (lambda r: gae(r, r, r, 1.5), r"gae: lam is 1.5, expected in \[0, 1\]"),
        (lambda r: gae(r, r, r, 0.9, cut=r > 0), r"'cut' needs a bootstrap \[1, 3\], given is none"),
        (lambda r: gae(r, r, r, 0.9, bootstrap=r[:, 0], cut=r > 0), r"needs a bootstrap \[1, 3\], given is \[1\]"),
        (lambda r: gae(r, r, r, 0.9, bootstrap=r[:, :2]), r"bootstrap has shape \[1, 2\], expected \[1\] or \[1, 3\]"),
        (lambda r: gae(r[0], r, r, 0.9), r"rewards have shape \[3\], expected \[B, T\]"),
        (lambda r: n_step_return(r, r, 0), "n is 0, expected at least 1"),
        (lambda r: n_step_target(r, r, r, 1, bootstrap=r), r"bootstrap has shape \[1, 3\], expected \[1\]"),
        (lambda r: vtrace(r, r, r, r, clip_rho=0.0), "clip_rho=0.0, clip_c=1.0; expected > 0"),
        (lambda r: on_last_step(r, r > 0), r"expected \[B\], \[B, T\]"),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(rows(1, 2, 3))  # type: ignore[operator]
