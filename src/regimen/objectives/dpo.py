"""Direct preference optimisation: raise the chosen answer over the rejected one, without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import logsigmoid

from regimen.fields import STEP_FIELDS
from regimen.functions.aggregate import group_weights
from regimen.objectives.base import Batch, Objective
from regimen.policies.base import Policy
from regimen.rollout import Rollout

Variant = Literal["sigmoid", "hinge", "ipo", "robust"]


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    variant: Variant = "sigmoid",
    *,
    smoothing: Tensor | float = 0.0,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """Loss per pair from how much likelier each answer is than under the reference.

    With `z = beta (chosen - rejected) - margin` and `s` the chance that a label is wrong:

    - `"sigmoid"`: `-(1 - s) log sigma(z) - s log sigma(-z)` (Rafailov et al. 2023, eq. 7; smoothing, Mitchell 2023);
    - `"robust"`: `(-(1 - s) log sigma(z) + s log sigma(-z)) / (1 - 2 s)`, whose mean over labels flipped with chance
      `s` is the loss of the true ones (Chowdhury et al. 2024);
    - `"hinge"`: `max(0, 1 - z)` (Zhao et al. 2023);
    - `"ipo"`: `((z - 1/2) / beta)^2`, which is `(chosen - rejected - 1 / (2 beta))^2` without margin (Azar et al.
      2024, eq. 17).

    Args:
        chosen, rejected: `[P]`, `log pi - log pi_reference` of an answer, summed or averaged over its steps.
        beta: strength of the tie to the reference.
        variant: one of the above.
        smoothing: number or `[P]`, in [0, 0.5]; below 0.5 for `"robust"`. A label that is more likely wrong than
            right should be flipped instead.
        margin: number or `[P]`, by how much the rewards should differ (Amini et al. 2024).

    Returns:
        `[P]`. Equal log-ratios give log 2 (sigmoid).

    Raises:
        ValueError: unequal shapes, `beta` not positive, an unknown variant, or a smoothing that it does not have.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"dpo_loss: chosen {list(chosen.shape)} and rejected {list(rejected.shape)} differ")
    _check_settings("dpo_loss", beta, variant, smoothing)
    z = beta * (chosen - rejected) - margin
    if variant == "hinge":
        return (1 - z).clamp(min=0)
    if variant == "ipo":
        return ((z - 0.5) / beta).square()
    right, wrong = -(1 - smoothing) * logsigmoid(z), -smoothing * logsigmoid(-z)
    return right + wrong if variant == "sigmoid" else (right - wrong) / (1 - 2 * smoothing)


def _check_settings(owner: str, beta: float, variant: str, smoothing: Tensor | float) -> None:
    if beta <= 0:
        raise ValueError(f"{owner}: beta is {beta}, expected above 0")
    if variant not in get_args(Variant):
        raise ValueError(f"{owner}: variant '{variant}' is not one of {', '.join(get_args(Variant))}")
    share = torch.as_tensor(smoothing)
    if bool(((share < 0) | (share > 0.5)).any()):
        raise ValueError(f"{owner}: smoothing is {smoothing}, expected in [0, 0.5]; flip a pair that is likely wrong")
    if variant == "robust" and bool((share == 0.5).any()):
        raise ValueError(f"{owner}: 'robust' needs a smoothing below 0.5: at 0.5 a label says nothing")
    if variant in ("hinge", "ipo") and bool((share != 0).any()):
        raise ValueError(f"{owner}: '{variant}' has no smoothing; use 'sigmoid' or 'robust'")


def rejected_rollout(rollout: Rollout) -> Rollout:
    """The rejected samples of `P` pairs, which lie in the column `rejected`, as a rollout of `P` rows.

    Knobs that the table lacks are those of the chosen samples.

    Raises:
        ValueError: the rollout is not one of pairs, or the table has no `mask`.
    """
    if "rejected" not in rollout.columns.keys():  # noqa: SIM118
        raise ValueError(
            f"the rollout of task {'/'.join(rollout.task_names)} has no column 'rejected', so its rows are no pairs; "
            "give the stage BestWorstPairSelector, or a data set of pairs"
        )
    table = rollout["rejected"]
    fields = {name: value for name, value in table.items() if name not in ("task", "group", "knobs")}
    if "mask" not in fields:
        raise ValueError(f"the table 'rejected' of a pair has no 'mask [P, T]'; it has: {', '.join(sorted(fields))}")
    rejected = Rollout.create(task=rollout.task_names[0], group=rollout.group, **fields)
    in_force = table.get("knobs", rollout.knobs)
    return Rollout(rejected.data, rollout.task_names).replace(task=rollout.task, knobs=in_force)


@torch.no_grad()
def record_logprobs(pairs: TensorDict, policy: Policy, column: str = "reference", batch_size: int = 64) -> TensorDict:
    """A data set of pairs with a policy's log-probabilities of both sides, `[N, T]` each, computed once.

    With `DatasetTask("pairs", record_logprobs(pairs, reference))` and `DPOObjective(recorded="reference")`, the loss is
    that with `reference` as a frozen member, which then need not be kept.

    Args:
        pairs: table `[N]` as a `DatasetTask` takes it, the rejected side in its nested table `rejected`.
        policy: as it is now.
        column: name of the column.
        batch_size: pairs at a time.

    Raises:
        ValueError: the table is not one of pairs.
    """
    chosen, rejected = list[Tensor](), list[Tensor]()
    for rows in pairs.split(batch_size):
        side = _as_rollout(rows)
        chosen.append(policy.distribution(side, side.loss_mask).logprob)
        other = rejected_rollout(side)
        rejected.append(policy.distribution(other, other.loss_mask).logprob)
    nested = pairs["rejected"].copy()
    columns = nested.get("columns", TensorDict({}, batch_size=pairs.batch_size)).copy()
    nested.set("columns", columns.set(column, torch.cat(rejected)))
    return pairs.copy().set(column, torch.cat(chosen)).set("rejected", nested)


def _as_rollout(rows: TensorDict) -> Rollout:
    fields = {name: value for name, value in rows.items() if name in STEP_FIELDS}
    if "mask" not in fields:
        raise ValueError(f"record_logprobs: the table of pairs has no 'mask [N, T]'; it has: {', '.join(rows.keys())}")
    context, columns = rows.get("context", None), rows.exclude("context", *fields)
    return Rollout.create(task="pairs", group=torch.arange(len(rows)), context=context, columns=columns, **fields)


@dataclass(frozen=True)
class DPOObjective(Objective):
    """Preference optimisation on pairs, for any policy with log-probabilities; see `dpo_loss`.

    A row of the batch is a pair: the chosen sample, with the rejected one in its column `rejected`. Side columns
    `margin`, `smoothing` and `weight`, each `[P]`, are used where they exist; the loss is the mean of weight times
    loss over the pairs. With `group_by` it is the mean of such means over the groups that are there: of MAH-DPO (arXiv
    2510.01167), whose pairs are tagged with an objective each.

    Attributes:
        beta, variant: see `dpo_loss`.
        label_smoothing: for pairs without a column `smoothing`.
        length_normalize: average log-ratios over steps instead of summing them. `"ipo"` is usually run so.
        reference: a frozen member of the cast; `None` for a reference that finds all answers equally likely.
        recorded: a side column `[P, T]` of chosen and of rejected samples with the reference's log-probabilities,
            read in place of the member; see `record_logprobs`. `"logprobs"` takes what the samples were drawn with,
            for pairs that the reference drew itself.
        group_by: a side column int64 `[P]`; groups count the same, however many pairs they have.
        group_shares: what group 0, 1, ... counts instead.
        member: the policy that is trained.
    """

    beta: float = 0.1
    variant: Variant = "sigmoid"
    label_smoothing: float = 0.0
    length_normalize: bool = False
    reference: str | None = "reference"
    recorded: str | None = None
    group_by: str | None = None
    group_shares: tuple[float, ...] | None = None
    member: str = "policy"
    name: str = "dpo"

    def __post_init__(self) -> None:
        _check_settings("DPOObjective", self.beta, self.variant, self.label_smoothing)
        if self.group_shares is not None and self.group_by is None:
            raise ValueError(f"DPOObjective: group_shares={self.group_shares} of no groups; name a column as group_by")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the loss per pair, or over groups.

        Metrics, over all pairs and for group `g` with `/g` behind the name: `preference_accuracy`, share of pairs whose
        chosen answer gained more over the reference; `preference_margin`, mean of `beta` times the difference;
        `chosen_logratio` and `rejected_logratio`, the means of both sides, because both may fall while their difference
        grows.
        """
        other = Batch(rejected_rollout(batch.rollout), batch.cast, batch.knobs, batch.rng)
        chosen, rejected = self._logratio(batch), self._logratio(other)
        table = batch.rollout.columns
        per_pair = dpo_loss(
            chosen,
            rejected,
            self.beta,
            self.variant,
            smoothing=table.get("smoothing", self.label_smoothing),
            margin=table.get("margin", 0.0),
        )
        gap = (chosen - rejected).detach()
        told = {
            "preference_accuracy": (gap > 0).to(gap.dtype),
            "preference_margin": self.beta * gap,
            "chosen_logratio": chosen.detach(),
            "rejected_logratio": rejected.detach(),
        }
        metrics = {name: value.mean() for name, value in told.items()}
        weighted = per_pair * table.get("weight", 1.0)
        if self.group_by is None:
            return weighted.mean() * batch.share, metrics
        return (weighted * self._group_weights(batch)).sum(), metrics | self._by_group(told, batch)

    def _groups(self, batch: Batch) -> Tensor:
        """int64, the groups of the whole minibatch."""
        groups: Tensor = (batch.rollout if batch.whole is None else batch.whole)[str(self.group_by)]
        return groups

    def _group_weights(self, batch: Batch) -> Tensor:
        shares = None if self.group_shares is None else torch.tensor(self.group_shares)
        return group_weights(self._groups(batch), shares)[batch.rows]

    def _by_group(self, told: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Means within groups; what slices of a minibatch say is averaged by their shares of its pairs."""
        groups, found = self._groups(batch), dict[str, Tensor]()
        for group in groups.unique().tolist():
            member = groups == group
            factor = member[batch.rows] / (member.sum() * batch.share)
            found |= {f"{name}/{group}": (value * factor).sum() for name, value in told.items()}
        return found

    def _logratio(self, side: Batch) -> Tensor:
        """`[P]`, log-probability of one side's answers over the reference's."""
        mask = side.rollout.loss_mask
        per_step = side.distribution(self.member).logprob - self._reference(side)
        total = torch.where(mask, per_step, 0).sum(1)
        return total / mask.sum(1).clamp(min=1) if self.length_normalize else total

    def _reference(self, side: Batch) -> Tensor | float:
        if self.recorded == "logprobs":
            return side.require("logprobs", "DPOObjective", "sample the pairs at a temperature above 0, or record them")
        if self.recorded is not None:
            recorded: Tensor = side.rollout[self.recorded]
            return recorded
        if self.reference is None:
            return 0.0
        if self.reference not in side.cast:
            raise ValueError(
                f"DPOObjective needs the member '{self.reference}', which the cast lacks (it has: "
                f"{', '.join(side.cast)}); give the stage rules=[ReferenceRefresh(member='{self.reference}')], name a "
                "column of recorded log-probabilities, or set reference=None"
            )
        return side.distribution(self.reference).logprob.detach()
