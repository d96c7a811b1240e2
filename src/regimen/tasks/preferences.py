"""Users and what they prefer: rows with a user's pairs each, and how well a latent reward knows users it never met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.models.latent_reward import LatentReward, Pairs


def preference_rows(
    first: Tensor, second: Tensor, label: Tensor, mask: Tensor | None = None, **columns: Tensor
) -> TensorDict:
    """Rows for a `DatasetTask`: a user each, whose pairs are the steps; see `VariationalPreferenceObjective`.

    Args:
        first, second: `[U, N, L, S]`; label: `[U, N]`; mask: bool `[U, N]`; see `Pairs`.
        columns: `[U, ...]` each, such as `user`, the hidden kind of a user, which only evaluations read.

    Raises:
        ValueError: what is no `Pairs`.
    """
    mask = torch.ones_like(label, dtype=torch.bool) if mask is None else mask
    pairs = Pairs(first, second, label, mask)
    steps = TensorDict({"first": first, "second": second, "label": label}, batch_size=label.shape)
    return TensorDict({"mask": mask, "step_columns": steps, **columns}, batch_size=[len(pairs)])


def pairs_of(rows: TensorDict) -> Pairs:
    """The pairs in rows that `preference_rows` made."""
    return Pairs.of(rows["step_columns"], rows["mask"])


def random_context(rows: TensorDict, rng: torch.Generator) -> TensorDict:
    """A transform of such rows: of each user's `N` pairs the encoder is shown the first 1 to `N`, as many at random.

    A reward model trained so knows users of whom little has been asked.
    """
    mask: Tensor = rows["mask"]
    count = torch.randint(1, mask.shape[1] + 1, (len(mask), 1), generator=rng, device=rng.device)
    shown = torch.arange(mask.shape[1], device=mask.device) < count
    steps = rows["step_columns"].exclude("shown").set("shown", shown)
    return rows.exclude("step_columns").set("step_columns", steps)


def right_pairs(model: LatentReward, pairs: Pairs, latents: Tensor) -> Tensor:
    """The share of each user's pairs whose order the reward gets right, `[B]`; a tie counts as the second's."""
    right = (model.compare(pairs, latents) > 0) == (pairs.label > 0.5)
    return (right & pairs.mask).sum(1) / pairs.mask.sum(1).clamp(min=1)


@torch.no_grad()
def personal_accuracy(
    cast: Mapping[str, Any], rows: TensorDict, context: int, member: str = "reward_model"
) -> dict[str, float]:
    """How well a latent reward knows users of whom it has seen their first `context` pairs; a `Measure` of a data set.

    Returns:
        `accuracy`, share of the other pairs that it gets right with the posterior's mean; `context_accuracy`, of those
        that it has seen; `kl`, in nats per user; `active_units`; and, if there is a column `user`, `probe`, how often a
        linear map of the latent, fitted to half of the users, tells the kind of the others.
    """
    model = cast[member]
    pairs = pairs_of(rows.to(model.device))
    posterior = model.infer(pairs[:context])
    found = {
        "accuracy": right_pairs(model, pairs[context:], posterior.mean).mean(),
        "context_accuracy": right_pairs(model, pairs[:context], posterior.mean).mean(),
        "kl": posterior.kl(model.prior).mean(),
        "active_units": posterior.active_units(),
    }
    if "user" in rows.keys():  # noqa: SIM118
        found["probe"] = _probe(posterior.mean.cpu(), rows["user"].cpu())
    return {name: float(value) for name, value in found.items()}


def _probe(latents: Tensor, user: Tensor) -> Tensor:
    half, kinds = len(user) // 2, torch.nn.functional.one_hot(user)
    features = torch.cat([latents.double(), torch.ones(len(user), 1, dtype=torch.float64)], 1)
    fitted = torch.linalg.lstsq(features[:half], kinds[:half].double()).solution
    return ((features[half:] @ fitted).argmax(1) == user[half:]).double().mean()
