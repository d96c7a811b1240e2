"""How a language model reads a rollout of texts: the hidden state before each step that is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regimen.models.causal_lm import CausalLM
from regimen.models.packing import Packed
from regimen.rollout import Rollout

READ_AT_ONCE = 64
"""Rows that are read in one pass, sorted by length: in a larger batch, most of the work would go into padding."""


def states_before(
    network: CausalLM, rollout: Rollout, where: Tensor, images: Mapping[str, Tensor] | None = None
) -> Tensor:
    """`[R, D]`: the hidden state before each of the steps `where` (bool `[B, T]`), in row order.

    Only what comes before a row's last step is read. A model whose forward pass is known is given the tokens without
    padding, and what several rows begin with once.

    Args:
        network: the model.
        rollout: sequences, with columns `visible` and `positions` if it has them, see `TokenPolicy`.
        where: steps, none of them a row's first.
        images: what the processor made of the contexts.
    """
    special = images or any(rollout.get(name) is not None for name in ("visible", "positions"))
    if not special and (forward := network.forward_pass) is not None:
        packed = Packed.of(rollout.actions, where)
        return forward.packed(packed)[packed.before]
    # The tokens that must be read: those before a row's last step.
    before = (where * torch.arange(rollout.steps, device=where.device)).amax(1)
    order = before.argsort()
    parts = [_read(network, rollout, images, rows, int(before[rows].max())) for rows in order.split(READ_AT_ONCE)]
    return torch.cat(parts).index_select(0, order.argsort())[where]


def _read(
    network: CausalLM, rollout: Rollout, images: Mapping[str, Tensor] | None, rows: Tensor, length: int
) -> Tensor:
    """`[R, T, D]`: the state before each token of some rows, after reading their first `length` tokens."""
    ids = rollout.actions[rows, :length]
    if length == 0:
        return torch.zeros(*rollout.actions[rows].shape, network.config.hidden_size, device=ids.device)
    images = None if images is None else {name: value[rows] for name, value in images.items()}
    visible, positions = rollout.get("visible"), rollout.get("positions")
    if visible is not None:
        visible = visible[rows, :length, :length].tril()
    if positions is not None:
        positions = positions[rows, :length]
    elif images:
        positions = network.positions(rollout.mask[rows, :length], ids, images)
    hidden = network.hidden(ids, visible=visible, positions=positions, images=images)
    return nn.functional.pad(hidden, (0, 0, 1, rollout.steps - 1 - length))
