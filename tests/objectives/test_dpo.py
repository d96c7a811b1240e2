"""Direct preference optimisation: worked numbers, limits, gradients, and pairs from memory to weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.credit.pairs import BestWorstPairSelector
from regimen.functions.aggregate import group_weights
from regimen.knobs import Knobs
from regimen.objectives.base import Batch
from regimen.objectives.dpo import DPOObjective, dpo_loss, record_logprobs, rejected_rollout
from regimen.objectives.supervised import SFTObjective
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask

PROMPTS, WORDS, STEPS = 3, 5, 4


class Steps:
    """Log-probabilities of recorded words."""

    def __init__(self, logits: Tensor, actions: Tensor, where: Tensor) -> None:
        chosen = logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        self.logprob = torch.where(where, chosen, 0)


class Writer(nn.Module):
    """A word distribution per prompt and step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(PROMPTS, STEPS, WORDS, generator=rng, dtype=torch.float64))

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Steps:
        logits = self.logits[rollout.context["prompt"], : rollout.steps]
        return Steps(logits, rollout.actions, rollout.mask if where is None else where)


def written(seed: int = 0, batch: int = 12) -> Rollout:
    """Judged answers of various lengths, four per prompt."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, STEPS + 1, (batch, 1), generator=rng)
    group = torch.arange(batch) // 4
    return Rollout.create(
        task="write", group=group, mask=torch.arange(STEPS) < lengths, context={"prompt": group % PROMPTS},
        actions=torch.randint(WORDS, (batch, STEPS), generator=rng), reward=torch.rand(batch, generator=rng),
    )  # fmt: skip


@pytest.fixture
def pairs() -> Rollout:
    return BestWorstPairSelector()(written(), {}, {})


@pytest.fixture
def cast() -> dict[str, Writer]:
    return {"policy": Writer(0), "reference": Writer(1).requires_grad_(False)}


def loss_of(objective: DPOObjective, pairs: Rollout, cast: Any) -> Tensor:
    return objective(Batch(pairs, cast, {}, torch.Generator())).total


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_worked_numbers() -> None:
    chosen = doubles(-10 + 12, -12, -20 + 25)
    rejected = doubles(-15 + 13, -12, -30 + 22)
    expected = doubles(0.513015, 0.693147, 0.241008)
    assert torch.allclose(dpo_loss(chosen, rejected, 0.1), expected, atol=1e-6)
    # two pairs whose margins are 0.2 and -0.2
    pair = dpo_loss(doubles(-12 + 13, -20 + 19), doubles(-15 + 14, -18 + 19), 0.1)
    assert torch.allclose(pair, doubles(0.598139, 0.798139), atol=1e-6)


def test_other_variants_by_hand() -> None:
    chosen, rejected = doubles(3.0), doubles(-1.0)
    assert float(dpo_loss(chosen, rejected, 0.1, "hinge")) == pytest.approx(1 - 0.4)
    assert float(dpo_loss(chosen, rejected, 0.5, "hinge")) == 0
    assert float(dpo_loss(chosen, rejected, 0.1, "ipo")) == pytest.approx((4 - 5) ** 2)
    assert float(dpo_loss(chosen, rejected, 0.125, "ipo")) == 0


@pytest.mark.parametrize("variant", ["sigmoid", "robust"])
def test_policy_at_its_reference(variant: Any, pairs: Rollout, cast: dict[str, Writer]) -> None:
    """Before any step every pair costs log 2, and so do identical answers at any step."""
    cast["reference"].load_state_dict(cast["policy"].state_dict())
    assert float(loss_of(DPOObjective(0.1, variant), pairs, cast).detach()) == pytest.approx(math.log(2))
    cast["reference"] = Writer(5).requires_grad_(False)
    same = pairs.with_columns(rejected=pairs.data.exclude("columns"))
    assert float(loss_of(DPOObjective(0.1, variant), same, cast).detach()) == pytest.approx(math.log(2))


def test_small_beta(pairs: Rollout, cast: dict[str, Writer]) -> None:
    """As beta falls the loss tends to log 2 and its gradient, over beta, to that of half the difference."""
    tiny = loss_of(DPOObjective(1e-7), pairs, cast)
    assert float(tiny.detach()) == pytest.approx(math.log(2), abs=1e-6)
    (slope,) = torch.autograd.grad(tiny / 1e-7, [cast["policy"].logits])
    rejected = rejected_rollout(pairs)
    policy = cast["policy"]
    gap = policy.distribution(pairs).logprob.sum(1) - policy.distribution(rejected).logprob.sum(1)
    (expected,) = torch.autograd.grad(-gap.mean() / 2, [policy.logits])
    assert torch.allclose(slope, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["sigmoid", "hinge", "ipo", "robust"])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradient_is_that_of_finite_differences(
    variant: Any, normalized: bool, pairs: Rollout, cast: dict[str, Writer]
) -> None:
    objective = DPOObjective(
        0.3, variant, label_smoothing=0.1 if variant in ("sigmoid", "robust") else 0.0, length_normalize=normalized
    )
    policy = cast["policy"]
    (slope,) = torch.autograd.grad(loss_of(objective, pairs, cast), [policy.logits])
    found = torch.zeros_like(slope).flatten()
    flat = policy.logits.data.view(-1)
    for index in range(len(flat)):
        kept, sides = float(flat[index]), []
        for step in (1e-5, -1e-5):
            flat[index] = kept + step
            sides.append(float(loss_of(objective, pairs, cast).detach()))
        flat[index] = kept
        found[index] = (sides[0] - sides[1]) / 2e-5
    assert torch.allclose(slope.flatten(), found, atol=1e-6)


def test_smoothing() -> None:
    chosen, rejected = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    plain, flipped = dpo_loss(chosen, rejected, 0.5), dpo_loss(rejected, chosen, 0.5)
    assert torch.allclose(dpo_loss(chosen, rejected, 0.5, smoothing=0.2), 0.8 * plain + 0.2 * flipped)
    # a label that says nothing pulls the margin to 0
    gap = torch.zeros(1, requires_grad=True)
    dpo_loss(gap, torch.zeros(1), 1.0, smoothing=0.5).backward()
    assert gap.grad is not None
    assert float(gap.grad) == 0


def test_robust_undoes_wrong_labels_on_average() -> None:
    chosen, rejected = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    right = dpo_loss(chosen, rejected, 0.5, "robust", smoothing=0.3)
    wrong = dpo_loss(rejected, chosen, 0.5, "robust", smoothing=0.3)
    assert torch.allclose(0.7 * right + 0.3 * wrong, dpo_loss(chosen, rejected, 0.5))


def test_margin() -> None:
    """A pair and its flip with the opposite margin are complementary."""
    chosen, rejected, margin = torch.randn(3, 20, dtype=torch.float64)
    pair = dpo_loss(chosen, rejected, 0.5, margin=margin)
    flip = dpo_loss(rejected, chosen, 0.5, margin=-margin)
    assert torch.allclose((-pair).exp() + (-flip).exp(), torch.ones(20, dtype=torch.float64))
    shifted = dpo_loss(chosen, rejected, 0.5, "ipo", margin=0.4)
    assert torch.allclose(shifted, dpo_loss(chosen - 0.8, rejected, 0.5, "ipo"))


def test_pair_columns_are_read(pairs: Rollout, cast: dict[str, Writer]) -> None:
    count = len(pairs)
    weight, margin = torch.arange(count).double(), torch.linspace(-1, 1, count).double()
    smoothing = torch.linspace(0, 0.5, count).double()
    marked = pairs.with_columns(weight=weight, margin=margin, smoothing=smoothing)
    single = [loss_of(DPOObjective(0.3), pairs[i : i + 1].with_columns(
        margin=margin[i : i + 1], smoothing=smoothing[i : i + 1]), cast) for i in range(count)]  # fmt: skip
    expected = sum(w * loss for w, loss in zip(weight, single, strict=True)) / count
    assert torch.allclose(loss_of(DPOObjective(0.3), marked, cast), expected)


def test_recorded_reference(pairs: Rollout, cast: dict[str, Writer]) -> None:
    """Log-probabilities that were recorded serve as well as the member, which may then be gone."""
    rejected = rejected_rollout(pairs)
    with torch.no_grad():
        sides = [cast["reference"].distribution(side).logprob for side in (pairs, rejected)]
    nested = rejected.with_columns(ref=sides[1]).data
    recorded = pairs.with_columns(ref=sides[0], rejected=nested)
    expected = loss_of(DPOObjective(0.3), pairs, cast)
    found = loss_of(DPOObjective(0.3, recorded="ref"), recorded, {"policy": cast["policy"]})
    assert torch.equal(found, expected)


def test_no_reference(pairs: Rollout, cast: dict[str, Writer]) -> None:
    policy, rejected = cast["policy"], rejected_rollout(pairs)
    gap = policy.distribution(pairs).logprob.sum(1) - policy.distribution(rejected).logprob.sum(1)
    expected = -torch.nn.functional.logsigmoid(0.3 * gap).mean()
    assert torch.equal(loss_of(DPOObjective(0.3, reference=None), pairs, {"policy": policy}), expected)


def test_length_normalisation_divides_by_steps(pairs: Rollout, cast: dict[str, Writer]) -> None:
    def mean(side: Rollout) -> Tensor:
        difference = cast["policy"].distribution(side).logprob - cast["reference"].distribution(side).logprob
        return difference.sum(1) / side.lengths

    expected = dpo_loss(mean(pairs), mean(rejected_rollout(pairs)), 0.3, "ipo").mean()
    assert torch.allclose(loss_of(DPOObjective(0.3, "ipo", length_normalize=True), pairs, cast), expected)


def test_only_learned_steps_count(pairs: Rollout, cast: dict[str, Writer]) -> None:
    """Forced words on either side move neither loss nor gradient."""
    free = pairs.loss_mask & (torch.arange(STEPS) > 0)
    forced = pairs.replace(loss_mask=free)
    changed = forced.actions.clone()
    changed[:, 0] = (changed[:, 0] + 1) % WORDS
    a = loss_of(DPOObjective(), forced, cast)
    b = loss_of(DPOObjective(), forced.replace(actions=changed), cast)
    assert torch.equal(a, b)


def test_micro_batches_add_up(pairs: Rollout, cast: dict[str, Writer]) -> None:
    whole = loss_of(DPOObjective(), pairs, cast)
    slices = [slice(0, 1), slice(1, len(pairs))]
    parts = [DPOObjective()(Batch(pairs[s], cast, {}, torch.Generator(), pairs.loss_mask, s)).total for s in slices]
    assert torch.allclose(sum(parts), whole)  # type: ignore[arg-type]


def test_metrics(pairs: Rollout, cast: dict[str, Writer]) -> None:
    metrics = DPOObjective(0.2)(Batch(pairs, cast, {}, torch.Generator())).metrics
    gap = float(metrics["chosen_logratio"] - metrics["rejected_logratio"])
    assert float(metrics["preference_margin"]) == pytest.approx(0.2 * gap)
    assert 0 <= float(metrics["preference_accuracy"]) <= 1


def test_likelihood_of_the_chosen_is_a_plain_sum(pairs: Rollout, cast: dict[str, Writer]) -> None:
    """A row is its chosen sample, so supervised likelihood needs no variant of its own."""
    objective = DPOObjective(0.3) + 0.2 * SFTObjective()
    total = objective(Batch(pairs, cast, Knobs.of(objective), torch.Generator())).total
    lone = pairs.replace(columns={})
    sft = SFTObjective()(Batch(lone, cast, {}, torch.Generator())).total
    assert torch.allclose(total, loss_of(DPOObjective(0.3), pairs, cast) + 0.2 * sft)


def test_learns_the_preference() -> None:
    """From samples to weights: the chosen answers become likelier than the rejected ones, the tie holds the rest."""
    policy = Writer(0)
    members = Cast(policy=policy)
    members.snapshot("policy", "reference")
    pairs = BestWorstPairSelector()(written(), {}, {})
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = DPOObjective(0.5)(Batch(pairs, members, {}, torch.Generator()))
        loss.total.backward()
        optimizer.step()
    assert float(loss.metrics["preference_accuracy"]) == 1
    assert float(loss.total.detach()) < 0.1


def test_pairs_from_a_data_set(cast: dict[str, Writer]) -> None:
    """Rows of a data set need only what scoring reads; the rest is the chosen sample's."""
    side = TensorDict(
        {"context": {"prompt": torch.tensor([0, 1])}, "actions": torch.zeros(2, STEPS, dtype=torch.int64),
         "mask": torch.ones(2, STEPS, dtype=torch.bool)}, batch_size=[2],
    )  # fmt: skip
    rows = side.clone()
    rows["actions"] += 1
    rows["rejected"] = side
    task = DatasetTask("pairs", rows, order="sequential")
    drawn = task.collect(cast, {}, torch.Generator(), 2)
    assert (rejected_rollout(drawn).actions == drawn.actions - 1).all()
    assert loss_of(DPOObjective(), drawn, cast).isfinite()


def test_recorded_logprobs_give_the_loss_of_the_member(cast: dict[str, Writer]) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = TensorDict({"context": {"prompt": torch.arange(5) % 2}}, batch_size=[5])
    rows["actions"] = torch.randint(WORDS, (5, STEPS), generator=generator)
    rows["mask"] = torch.arange(STEPS) < torch.tensor([[STEPS], [1], [2], [STEPS], [1]])
    rows["rejected"] = rows.clone()
    rows["rejected", "actions"] = torch.randint(WORDS, (5, STEPS), generator=generator)
    losses = []
    for table, objective, members in [
        (rows, DPOObjective(0.3), cast),
        (
            record_logprobs(rows, cast["reference"], batch_size=2),
            DPOObjective(0.3, recorded="reference"),
            {"policy": cast["policy"]},
        ),
    ]:
        drawn = DatasetTask("pairs", table).collect(members, {}, torch.Generator().manual_seed(1), 4)
        losses.append(loss_of(objective, drawn, members))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
    assert "reference" not in rows.keys()  # noqa: SIM118
    with pytest.raises(ValueError, match="has no column 'rejected', so its rows are no pairs"):
        record_logprobs(rows.exclude("rejected"), cast["reference"])
    with pytest.raises(ValueError, match=r"the table of pairs has no 'mask \[N, T\]'"):
        record_logprobs(rows.exclude("mask"), cast["reference"])


@pytest.fixture
def tagged() -> Rollout:
    """Pairs of two objectives: nine of the first, three of the second."""
    pairs = BestWorstPairSelector()(written(batch=48), {}, {})
    return pairs.with_columns(objective=(torch.arange(12) > 8).long())


def losses_of(pairs: Rollout, cast: dict[str, Writer]) -> list[float]:
    """The mean loss of each objective's pairs."""
    return [float(loss_of(DPOObjective(), pairs[pairs["objective"] == group], cast).detach()) for group in (0, 1)]


def test_groups_count_the_same_however_many_pairs_they_have(tagged: Rollout, cast: dict[str, Writer]) -> None:
    """The mean over objectives of each one's mean; shares weight them; one that is absent does not count."""
    first, second = losses_of(tagged, cast)
    grouped = DPOObjective(group_by="objective")
    assert float(loss_of(grouped, tagged, cast).detach()) == pytest.approx((first + second) / 2)
    shared = DPOObjective(group_by="objective", group_shares=(3.0, 1.0))
    assert float(loss_of(shared, tagged, cast).detach()) == pytest.approx(0.75 * first + 0.25 * second)
    alone = tagged[tagged["objective"] == 1]
    assert float(loss_of(grouped, alone, cast).detach()) == pytest.approx(second)
    assert float(loss_of(shared, alone, cast).detach()) == pytest.approx(second)


def test_worked_groups() -> None:
    """Rows of loss 0.598139 and 0.798139, an objective each: 0.698139, and 0.648139 with shares of 0.75 and 0.25."""
    pair = dpo_loss(doubles(1, -1), doubles(-1, 1), 0.1)
    assert float((pair * group_weights(torch.tensor([0, 1]))).sum()) == pytest.approx(0.698139, abs=1e-6)
    shares = torch.tensor([0.75, 0.25])
    assert float((pair * group_weights(torch.tensor([0, 1]), shares)).sum()) == pytest.approx(0.648139, abs=1e-6)


def test_micro_batches_of_groups_add_up(tagged: Rollout, cast: dict[str, Writer]) -> None:
    """Loss and metrics of slices, of which some lack an objective, are those of the whole."""
    objective = DPOObjective(group_by="objective", group_shares=(1.0, 2.0))
    whole = objective(Batch(tagged, cast, {}, torch.Generator()))
    total, metrics = 0.0, dict.fromkeys(whole.metrics, 0.0)
    for start in range(0, 12, 5):
        rows = slice(start, start + 5)
        batch = Batch(tagged[rows], cast, {}, torch.Generator(), whole=tagged, rows=rows)
        part = objective(batch)
        total += float(part.total.detach())
        for name, value in part.metrics.items():
            metrics[name] += float(value) * batch.share
    assert total == pytest.approx(float(whole.total.detach()))
    assert metrics == pytest.approx({name: float(value) for name, value in whole.metrics.items()})


def test_metrics_by_group(tagged: Rollout, cast: dict[str, Writer]) -> None:
    found = DPOObjective(group_by="objective")(Batch(tagged, cast, {}, torch.Generator())).metrics
    for group in (0, 1):
        alone = DPOObjective()(Batch(tagged[tagged["objective"] == group], cast, {}, torch.Generator())).metrics
        for name, value in alone.items():
            assert float(found[f"{name}/{group}"]) == pytest.approx(float(value))


def test_pairs_that_the_reference_drew_bring_its_logprobs(pairs: Rollout, cast: dict[str, Writer]) -> None:
    """`recorded="logprobs"` gives the loss of the member, without it."""
    reference = cast["reference"]
    rejected = pairs["rejected"].copy()
    rejected.set("logprobs", reference.distribution(rejected_rollout(pairs)).logprob.detach())
    drawn = pairs.replace(logprobs=reference.distribution(pairs).logprob.detach()).with_columns(rejected=rejected)
    ours = loss_of(DPOObjective(recorded="logprobs"), drawn, {"policy": cast["policy"]})
    assert torch.allclose(ours, loss_of(DPOObjective(), pairs, cast))
    with pytest.raises(ValueError, match=r"DPOObjective needs 'logprobs'.*at a temperature above 0, or record them"):
        loss_of(DPOObjective(recorded="logprobs"), pairs, cast)


def test_groups_that_do_not_fit(tagged: Rollout, cast: dict[str, Writer]) -> None:
    with pytest.raises(ValueError, match=r"group_shares=\(1.0,\) of no groups; name a column as group_by"):
        DPOObjective(group_shares=(1.0,))
    with pytest.raises(ValueError, match=r"groups \[0, 1\] and 1 shares"):
        loss_of(DPOObjective(group_by="objective", group_shares=(1.0,)), tagged, cast)
    with pytest.raises(ValueError, match=r"the groups \[0, 1\] have shares \[0.0, 0.0\]; expected at least 0, and one"):
        loss_of(DPOObjective(group_by="objective", group_shares=(0.0, 0.0)), tagged, cast)
    with pytest.raises(KeyError, match="no column 'aspect'"):
        loss_of(DPOObjective(group_by="aspect"), tagged, cast)


def test_errors(pairs: Rollout, cast: dict[str, Writer]) -> None:
    for options, match in [
        ({"beta": 0.0}, "beta is 0.0, expected above 0"),
        ({"variant": "kto"}, "variant 'kto' is not one of sigmoid, hinge, ipo, robust"),
        ({"label_smoothing": 0.6}, r"expected in \[0, 0.5\]; flip a pair"),
        ({"variant": "robust", "label_smoothing": 0.5}, "'robust' needs a smoothing below 0.5"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "'hinge' has no smoothing"),
    ]:
        with pytest.raises(ValueError, match=match):
            DPOObjective(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"chosen \[2\] and rejected \[3\] differ"):
        dpo_loss(torch.ones(2), torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="has no column 'rejected', so its rows are no pairs"):
        loss_of(DPOObjective(), written(), cast)
    with pytest.raises(ValueError, match="DPOObjective needs the member 'reference'"):
        loss_of(DPOObjective(), pairs, {"policy": cast["policy"]})
    broken = pairs.with_columns(rejected=pairs.data.select("actions", "context"))
    with pytest.raises(ValueError, match="no 'mask"):
        rejected_rollout(broken)
