"""Final rewards spread over the steps that earned them.

Shapes are `[B, T]`, time runs to the right. `ends` is bool, the steps that may be paid: one for each action. An action
of a controller is a step; a turn of a dialogue is many, and its last one is paid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def action_ends(mask: Tensor, decided: Tensor, segment: Tensor | None = None) -> Tensor:
    """The last step of every action, bool `[B, T]`.

    Args:
        mask: bool `[B, T]`, steps that exist.
        decided: bool `[B, T]`, those that the policy took itself.
        segment: int64 `[B, T]`, which action (turn) of its sample a step belongs to; by default each is one. Two turns
            without a step between them are told apart by it, which gaps in `decided` could not do.

    Raises:
        ValueError: unequal shapes, or a sample without steps.
    """
    for name, given in (("decided", decided), ("segment", segment)):
        if given is not None and given.shape != mask.shape:
            raise ValueError(f"action_ends: {name} has shape {list(given.shape)}, expected {list(mask.shape)}")
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"action_ends: sample {row} has no steps to give its reward to; leave out empty samples")
    decided = mask & decided
    if segment is None:
        return decided
    steps = mask.shape[1]
    place = torch.arange(steps, device=mask.device)
    # The next step that was decided, or `steps`.
    later = torch.where(decided, place, steps).flip(1).cummin(1).values.flip(1)
    later = torch.cat([later[:, 1:], torch.full_like(later[:, :1], steps)], 1)
    following = segment.gather(1, later.clamp(max=steps - 1))
    return decided & ((later == steps) | (following != segment))


def redistribute(rewards: Tensor, replaced: Tensor, contributions: Tensor, mask: Tensor) -> Tensor:
    """Step rewards `[B, T]` with contributions in the place of the final reward; whatever else was paid stays.

    Where contributions add up to the final reward, an undiscounted return is what it was (SPA-RL, 2025, section 3).

    Args:
        rewards: `[B, T]`, all that is paid.
        replaced: `[B, T]`, the part of it that is replaced, such as a final reward on each sample's last step.
        contributions: `[B, T]`, what each step is paid instead.
        mask: bool `[B, T]`, steps that exist.

    Raises:
        ValueError: unequal shapes.
    """
    for name, given in (("replaced", replaced), ("contributions", contributions), ("mask", mask)):
        if given.shape != rewards.shape:
            raise ValueError(f"redistribute: {name} has shape {list(given.shape)}, expected {list(rewards.shape)}")
    return torch.where(mask, rewards - replaced + contributions, 0)


def uniform_contributions(final: Tensor, ends: Tensor) -> Tensor:
    """`R / n` for each of a sample's `n` actions, `[B, T]`."""
    return torch.where(ends, (final / ends.sum(1).clamp(min=1))[:, None], 0)


def leave_one_out_contributions(final: Tensor, group: Tensor, ends: Tensor) -> Tensor:
    """`R` minus the mean `R` of the others of the sample's group, for each action, `[B, T]`; 0 without others.

    As in the code published with SPA-RL (2025). They do not add up to `R`: each action is given all of it. Samples none
    of whose steps may be paid count nowhere, as those that could not be judged.
    """
    _, index = group.unique(return_inverse=True)
    groups, there = int(index.max()) + 1 if len(index) else 0, ends.any(1)
    final = torch.where(there, final, 0)
    count = torch.bincount(index[there], minlength=groups)[index]
    total = final.new_zeros(groups).index_add(0, index, final)[index]
    others = (total - final) / (count - 1).clamp(min=1)
    return torch.where(ends & (count > 1)[:, None], (final - others)[:, None], 0)


def remaining_actions(ends: Tensor) -> Tensor:
    """How many actions of a sample come after each: `n - k - 1` for action `k` of `n`, int64 `[B, T]`; 0 elsewhere."""
    return torch.where(ends, ends.sum(1, keepdim=True) - ends.cumsum(1), 0)


def misfit(predicted: Tensor, final: Tensor) -> Tensor:
    """Mean squared error over the variance, `[]`, of predictions of final rewards, both `[B]`.

    0 is exact, 1 what a constant earns; inf if all rewards are equal, where nothing can be said.
    """
    variance = final.double().var(correction=0)
    error = (predicted.double() - final.double()).square().mean()
    return torch.where(variance > 0, error / variance, torch.inf)
