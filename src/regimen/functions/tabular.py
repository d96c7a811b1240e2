"""Finite Markov decision processes in closed form: `S` states, `A` actions, in double precision.

Arguments that several functions share:

- `transitions`: `[S, A, S]`, probabilities of the next state.
- `rewards`: `[S, A]`, earned by an action in a state.
- `policy`: `[S, A]`, probabilities of the actions in a state.
- `discount`: in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def optimal_values(transitions: Tensor, rewards: Tensor, discount: float, tolerance: float = 1e-10) -> Tensor:
    """`[S, A]`, the values of actions under the best policy, by value iteration.

    Raises:
        ValueError: other shapes, rows that are no probabilities, or a discount outside [0, 1).
    """
    _check(transitions, discount, rewards=rewards)
    values = torch.zeros_like(rewards)
    while True:
        new = rewards + discount * transitions @ values.amax(1)
        if float((new - values).abs().max()) < tolerance:
            return new
        values = new


def state_values(transitions: Tensor, rewards: Tensor, policy: Tensor, discount: float) -> Tensor:
    """`[S]`, the discounted sum of rewards from each state under a policy.

    Raises:
        ValueError: as for `optimal_values`.
    """
    _check(transitions, discount, rewards=rewards, policy=policy)
    onward = _onward(transitions, policy)
    return torch.linalg.solve(_identity(onward) - discount * onward, (policy * rewards).sum(1))


def occupancy(transitions: Tensor, policy: Tensor, start: Tensor, discount: float) -> Tensor:
    """`[S, A]`, how often a policy takes each action in each state, discounted and normalised to a sum of 1.

    Args:
        start: `[S]`, probabilities of the first state; the others see above.

    Raises:
        ValueError: as for `optimal_values`.
    """
    _check(transitions, discount, policy=policy)
    onward = _onward(transitions, policy)
    visits = torch.linalg.solve(_identity(onward) - discount * onward.T, (1 - discount) * start)
    return visits[:, None] * policy


def _onward(transitions: Tensor, policy: Tensor) -> Tensor:
    """`[S, S]`, probabilities of the next state under a policy."""
    return torch.einsum("sa,san->sn", policy, transitions)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _check(transitions: Tensor, discount: float, **tables: Tensor) -> None:
    shape = transitions.shape
    fits = transitions.ndim == 3 and shape[0] == shape[2] and all(t.shape == shape[:2] for t in tables.values())
    if not fits or not 0 <= discount < 1:
        shown = ", ".join(f"{name} {list(table.shape)}" for name, table in tables.items())
        raise ValueError(
            f"transitions {list(shape)}, {shown}, discount {discount}; expected [S, A, S], [S, A], and a discount in "
            "[0, 1)"
        )
    for name, table in {"transitions": transitions, **tables}.items():
        if name == "rewards":
            continue
        if bool((table < 0).any()) or not torch.allclose(table.sum(-1), torch.ones_like(table[..., 0])):
            raise ValueError(f"{name}: expected probabilities that add up to 1 along the last dimension")
