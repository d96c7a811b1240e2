"""Returns and advantages along the steps of a sample: discounted sums, n steps, GAE, V-trace.

Shapes are `[B, T]`, time runs to the right. `rewards[:, t]` is what step `t` earned, `values[:, t]` the critic's
value of the state in which it was taken, and `discount[:, t]` what the value of the state after it is multiplied
by: termination (0), a horizon and a schedule are all this one tensor.

Arguments that several functions share:

- `mask`: bool, the steps that exist. Elsewhere the reward counts as 0 and the discount as 1, whatever stands there,
  and results are 0. All steps by default.
- `decided`: bool, the steps that a policy with a critic decided (forced and foreign ones are not). The others are
  passed through: their reward and discount count, but no value is read there and no credit given. `mask` by default.
- `bootstrap`: value of the state after a sample's last step, `[B]`; 0 by default.
- `cut`: bool, the steps after which the sample does not go on with the row's next step although the value does not
  end (an environment was reset at its time limit). `bootstrap` is then `[B, T]` and read where `cut` is true, and
  in the last column.

No function loops over samples or steps: a sum of T terms takes log2(T) passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def on_last_step(total: Tensor, mask: Tensor) -> Tensor:
    """A reward per sample `[B]` placed on the sample's last existing step, `[B, T]`; 0 elsewhere.

    Raises:
        ValueError: `mask` is not `[B, T]` for the total's B.
    """
    if total.ndim != 1 or mask.ndim != 2 or len(mask) != len(total):
        raise ValueError(f"on_last_step: total {list(total.shape)} and mask {list(mask.shape)}, expected [B], [B, T]")
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, total[:, None], 0)


def discounted_return(
    rewards: Tensor, discount: Tensor, mask: Tensor | None = None, bootstrap: Tensor | None = None
) -> Tensor:
    """`G_t = r_t + discount_t G_{t+1}`, `[B, T]`, from the bootstrap value backwards (Sutton & Barto 2018, eq. 3.9).

    Raises:
        ValueError: unequal shapes.
    """
    path = _Path("discounted_return", rewards, discount, mask, bootstrap)
    return torch.where(path.mask, _scan(path.gained, path.onward), 0)


def n_step_return(
    rewards: Tensor, discount: Tensor, n: int, mask: Tensor | None = None, *, cut: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the next `n` rewards, and what the value of the state after them is multiplied by.

    `R_t = sum_{i<n} (prod_{j<i} discount_{t+j}) r_{t+i}` and `D_t = prod_{i<n} discount_{t+i}` (Sutton 1988); fewer
    terms where the sample ends or is cut earlier. `n_step_target` adds the value; `n_step_last` says after which step.

    Returns:
        `R` and `D`, each `[B, T]`, 0 at steps that do not exist.

    Raises:
        ValueError: unequal shapes, or `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n_step_return: n is {n}, expected at least 1")
    path = _Path("n_step_return", rewards, discount, mask)
    onward = torch.ones_like(path.discount)
    if cut is not None:
        path.check("cut", cut)
        onward = torch.where(cut & path.mask, 0, onward)
    total, factor, goes_on = torch.zeros_like(path.rewards), torch.ones_like(path.discount), torch.ones_like(onward)
    for ahead in range(min(n, rewards.shape[1])):
        total = total + goes_on * factor * _shifted(path.rewards, ahead)
        factor = torch.where(goes_on > 0, factor * _shifted(path.discount, ahead, 1.0), factor)
        goes_on = goes_on * _shifted(onward, ahead, 1.0)
    return torch.where(path.mask, total, 0), torch.where(path.mask, factor, 0)


def n_step_last(n: int, mask: Tensor, cut: Tensor | None = None) -> Tensor:
    """Index of the last step whose reward is in each step's n-step sum, int64 `[B, T]`; see `n_step_return`.

    The step `n - 1` further on, or an earlier one at which the sample ends or is cut; its own at steps that do not
    exist.

    Raises:
        ValueError: unequal shapes, or `n` below 1.
    """
    if n < 1 or (cut is not None and cut.shape != mask.shape):
        shown = "" if cut is None else f", cut has shape {list(cut.shape)}"
        raise ValueError(f"n_step_last: n is {n}, mask has shape {list(mask.shape)}{shown}; expected n >= 1 and equal")
    step = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    ends = mask & ~pad(mask[:, 1:], (0, 1))
    ends = ends if cut is None else ends | (cut & mask)
    stop = torch.where(ends, step, mask.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.where(mask, torch.minimum(step + n - 1, stop), step)


def n_step_target(
    rewards: Tensor,
    values: Tensor,
    discount: Tensor,
    n: int,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """`R_t + D_t V_{t+n}`, `[B, T]`: the n-step return with its bootstrap; see `n_step_return`.

    Where fewer than `n` steps are left, the value is `bootstrap [B]`. With `n` of at least T this is
    `discounted_return`.

    Raises:
        ValueError: unequal shapes, or `n` below 1.
    """
    total, factor = n_step_return(rewards, discount, n, mask)
    if bootstrap is not None and bootstrap.ndim != 1:
        raise ValueError(f"n_step_target: bootstrap has shape {list(bootstrap.shape)}, expected [{len(rewards)}]")
    path = _Path("n_step_target", rewards, discount, mask, bootstrap)
    path.check("values", values)
    after = path.bootstrap[:, -1:]
    ahead = torch.cat([torch.where(path.mask, values, after), after.expand(-1, n)], 1)[:, n:]
    return total + factor * torch.where(path.mask, ahead[:, : values.shape[1]], 0)


def gae(
    rewards: Tensor,
    values: Tensor,
    discount: Tensor,
    lam: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    cut: Tensor | None = None,
    decided: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    `A_t = delta_t + discount_t lam A_{t+1}` with `delta_t = r_t + discount_t V_{t+1} - V_t`. `lam=0` is the
    temporal-difference error, `lam=1` the Monte-Carlo return minus the value.

    Returns:
        Advantages and value targets `A + V`, each `[B, T]`; 0 at steps that were not decided.

    Raises:
        ValueError: unequal shapes, `lam` outside [0, 1], or `cut` without a bootstrap `[B, T]`.
    """
    _check_share("gae", lam)
    path = _Path("gae", rewards, discount, mask, bootstrap, cut, decided)
    path.check("values", values)
    _, following = path.states(values)
    error = torch.where(path.decided, path.gained + path.onward * following - values, 0)
    advantages = _scan(error, torch.where(path.decided, lam * path.onward, path.onward))
    return torch.where(path.decided, advantages, 0), torch.where(path.decided, advantages + values, 0)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    discount: Tensor,
    ratio: Tensor,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    lam: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    cut: Tensor | None = None,
    decided: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace: advantages and value targets from another policy's samples (Espeholt et al. 2018, eq. 1 and sec. 4.2).

    With `rho = min(ratio, clip_rho)` and `c = lam min(ratio, clip_c)`, the target is
    `v_t = V_t + rho_t delta_t + discount_t c_t (v_{t+1} - V_{t+1})`, and the advantage
    `rho_t (r_t + discount_t v_{t+1} - V_t)`. On the policy's own samples the target is that of `gae` with this `lam`.

    Args:
        ratio: `[B, T]`, probability of the action under the policy over that under the behaviour.

    Returns:
        Advantages and value targets, each `[B, T]`; 0 at steps that were not decided.

    Raises:
        ValueError: as `gae`, or a clip that is not positive.
    """
    _check_share("vtrace", lam)
    if clip_rho <= 0 or clip_c <= 0:
        raise ValueError(f"vtrace: clip_rho={clip_rho}, clip_c={clip_c}; expected > 0")
    path = _Path("vtrace", rewards, discount, mask, bootstrap, cut, decided)
    path.check("values", values)
    path.check("ratio", ratio)
    here, following = path.states(values)
    rho = ratio.clamp(max=clip_rho)
    error = torch.where(path.decided, rho * (path.gained + path.onward * following - values), 0)
    trace = torch.where(path.decided, lam * ratio.clamp(max=clip_c), 1) * path.onward
    corrected = here + _scan(error, trace)
    advantages = rho * (path.gained + path.onward * _shifted(corrected, 1) - values)
    return torch.where(path.decided, advantages, 0), torch.where(path.decided, corrected, 0)


class _Path:
    """The rewards and discounts of samples with what does not exist taken out and the bootstrap put in.

    Attributes, each `[B, T]`: `gained`, reward and bootstrapped value of a step; `onward`, the discount where the
    row goes on, else 0.
    """

    def __init__(
        self,
        owner: str,
        rewards: Tensor,
        discount: Tensor,
        mask: Tensor | None = None,
        bootstrap: Tensor | None = None,
        cut: Tensor | None = None,
        decided: Tensor | None = None,
    ) -> None:
        self.owner, self.shape = owner, rewards.shape
        if rewards.ndim != 2:
            raise ValueError(f"{owner}: rewards have shape {list(rewards.shape)}, expected [B, T]")
        self.check("discount", discount)
        for name, given in (("mask", mask), ("cut", cut), ("decided", decided)):
            if given is not None:
                self.check(name, given)
        self.mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        self.decided = self.mask if decided is None else self.mask & decided
        self.rewards = torch.where(self.mask, rewards, 0)
        self.discount = torch.where(self.mask, discount, 1)
        self.bootstrap = self._bootstrap(bootstrap, cut)
        ends = torch.zeros_like(self.mask) if cut is None else cut & self.mask
        ends = torch.cat([ends[:, :-1], torch.ones_like(ends[:, -1:])], 1)
        self.onward = torch.where(ends, 0, self.discount)
        self.gained = self.rewards + torch.where(ends, self.discount * self.bootstrap, 0)

    def check(self, name: str, given: Tensor) -> None:
        """Raise `ValueError` unless a tensor has the rewards' shape."""
        if given.shape != self.shape:
            raise ValueError(f"{self.owner}: {name} has shape {list(given.shape)}, expected {list(self.shape)}")

    def _bootstrap(self, bootstrap: Tensor | None, cut: Tensor | None) -> Tensor:
        batch, steps = self.shape
        if cut is not None and (bootstrap is None or bootstrap.shape != self.shape):
            given = "none" if bootstrap is None else str(list(bootstrap.shape))
            raise ValueError(f"{self.owner}: 'cut' needs a bootstrap [{batch}, {steps}], given is {given}")
        if bootstrap is None:
            return torch.zeros_like(self.rewards)
        if bootstrap.shape not in ((batch,), self.shape):
            raise ValueError(
                f"{self.owner}: bootstrap has shape {list(bootstrap.shape)}, expected [{batch}] or [{batch}, {steps}]"
            )
        return bootstrap[:, None].expand(batch, steps) if bootstrap.ndim == 1 else bootstrap

    def states(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The value of every state, read through steps that were not decided, and that of the row's next."""
        here = _scan(torch.where(self.decided, values, self.gained), torch.where(self.decided, 0, self.onward))
        return here, _shifted(here, 1)


def _scan(addend: Tensor, factor: Tensor) -> Tensor:
    """`x_t = addend_t + factor_t x_{t+1}` for `[B, T]`, with 0 after the last column (Hillis & Steele 1986)."""
    reach = 1
    while reach < addend.shape[1]:
        addend = addend + factor * _shifted(addend, reach)
        factor = factor * _shifted(factor, reach)
        reach *= 2
    return addend


def _shifted(x: Tensor, steps: int, fill: float = 0.0) -> Tensor:
    """`x [B, T]` moved `steps` to the left."""
    return pad(x[:, steps:], (0, steps), value=fill)


def _check_share(owner: str, lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"{owner}: lam is {lam}, expected in [0, 1]")
