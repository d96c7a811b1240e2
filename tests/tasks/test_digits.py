"""The digits' world: its splits, its judge and evaluator, its pairs and its measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from tensordict import TensorDict
from torch import Tensor

from regimen.functions import nearest_distance
from regimen.models.classifiers import ImageClassifier
from regimen.rewards import EditReward, Scene
from regimen.rollout import Rollout
from regimen.tasks.worlds.digits import CLASSES, OPERATIONS, SHAPE, DigitsWorld, edit_target, edited


def rows_of(images: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in images.flatten(1).tolist()]


class Painter:
    """A policy that answers contexts with what a function paints."""

    def __init__(self, paint: Callable[[TensorDict], Tensor]) -> None:
        self.paint = paint

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        count = len(contexts)
        return Rollout.create(
            task="policy", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool), context=contexts,
            columns={"image": self.paint(contexts)},
        )  # fmt: skip


# Splits


def test_every_digit_is_in_one_split(digits: DigitsWorld) -> None:
    everything = torch.from_numpy(load_digits().images).float().view(-1, *SHAPE) / 8 - 1
    assert sorted(rows_of(digits.held_out) + rows_of(digits.train)) == sorted(rows_of(everything))
    assert not set(rows_of(digits.held_out)) & set(rows_of(digits.train))
    assert len(digits.held_out) == 360
    assert digits.train.amin() == -1
    assert digits.train.amax() == 1


def test_judge_and_evaluator_differ_in_kind_and_in_data(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: dict[type, tuple[set[Any], Tensor]] = {}

    def fit(self: ImageClassifier, images: Tensor, labels: Tensor) -> ImageClassifier:
        fitted[type(self.estimator)] = (set(rows_of(images)), labels)
        return self

    monkeypatch.setattr(ImageClassifier, "fit", fit)
    world = DigitsWorld(0)
    assert type(world.judge.estimator) is MLPClassifier
    assert type(world.evaluator.estimator) is SVC
    judge, evaluator = fitted[MLPClassifier][0], fitted[SVC][0]
    assert not judge & evaluator
    assert not (judge | evaluator) & set(rows_of(world.held_out))
    assert judge | evaluator == set(rows_of(world.train))
    assert len(fitted[SVC][1].unique()) == len(fitted[MLPClassifier][1].unique()) == CLASSES


def test_judge_and_evaluator_know_digits_that_they_never_saw(digits: DigitsWorld) -> None:
    labels = digits.held_out_labels
    assert (digits.evaluator.predict(digits.held_out) == labels).float().mean() > 0.95
    assert (digits.judge(digits.held_out).argmax(1) == labels).float().mean() > 0.9


def test_a_world_is_decided_by_its_seed(digits: DigitsWorld) -> None:
    again, other = DigitsWorld(0), DigitsWorld(1)
    assert torch.equal(again.train, digits.train)
    assert torch.equal(again.judge(digits.held_out[:9]), digits.judge(digits.held_out[:9]))
    assert not torch.equal(other.held_out, digits.held_out)
    policies = [again.policy(seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[0])
    assert any(not torch.equal(policies[0][key], policies[2][key]) for key in policies[0])


# Pairs


def drawn(digits: DigitsWorld, wrong: float, size: int = 1200) -> Rollout:
    rng = torch.Generator().manual_seed(0)
    return digits.supervised("pairs", wrong).collect({}, {}, rng, size)


def truth(digits: DigitsWorld, rollout: Rollout) -> Tensor:
    """The right condition of every pair, from its pixels alone."""
    images, context = rollout["image"], rollout.context
    labels = dict(zip(rows_of(digits.train), digits.train_labels.tolist(), strict=True))
    found = []
    for image, reference, has in zip(images, context["reference"], context["has_reference"].tolist(), strict=True):
        if not has:
            found.append(labels[tuple(image.flatten().tolist())])
            continue
        fits = [i for i, apply in enumerate(OPERATIONS.values()) if torch.equal(apply(reference), image)]
        assert fits
        found.append(CLASSES + fits[0] if len(fits) == 1 else -1)
    return torch.tensor(found)


def test_right_pairs_are_half_classes_and_half_edits(digits: DigitsWorld) -> None:
    rollout = drawn(digits, 0.0)
    right, shown = truth(digits, rollout), rollout.context["condition"]
    # A digit may be its own mirror image, and then two operations fit.
    known = right >= 0
    assert known.float().mean() > 0.99
    assert torch.equal(shown[known], right[known])
    assert int(rollout.context["has_reference"].sum()) == 600
    assert (rollout.context["reference"][~rollout.context["has_reference"]] == 0).all()
    assert torch.bincount(shown, minlength=14).min() > 30


@pytest.mark.parametrize("wrong", [0.4, 1.0])
def test_share_of_wrong_conditions_is_as_asked_and_each_is_of_its_kind(wrong: float, digits: DigitsWorld) -> None:
    rollout = drawn(digits, wrong)
    right, shown = truth(digits, rollout), rollout.context["condition"]
    known = right >= 0
    spoilt = (shown != right)[known].float()
    # Binomial deviation: sqrt(0.4 * 0.6 / 1200) = 0.014.
    assert float(spoilt.mean()) == pytest.approx(wrong, abs=5 * 0.0142)
    assert torch.equal(shown >= CLASSES, rollout.context["has_reference"])
    assert int(shown.max()) < CLASSES + len(OPERATIONS)


def test_pairs_are_spoilt_anew_at_every_draw(digits: DigitsWorld) -> None:
    task = digits.supervised("pairs", 0.5)
    rng = torch.Generator().manual_seed(0)
    epochs = [task.collect({}, {}, rng, len(digits.train)) for _ in range(2)]
    seen = []
    for epoch in epochs:
        plain = ~epoch.context["has_reference"]
        pairs = zip(rows_of(epoch["image"][plain]), epoch.context["condition"][plain].tolist(), strict=True)
        seen.append(dict(pairs))
    both = seen[0].keys() & seen[1].keys()
    assert len(both) > 200
    assert 0.3 < sum(seen[0][key] != seen[1][key] for key in both) / len(both) < 0.95


@pytest.mark.parametrize("kind", ["supervised", "generation", "editing"])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_samples(kind: str, digits: DigitsWorld) -> None:
    def made() -> Any:
        return digits.supervised("pairs", 0.4) if kind == "supervised" else getattr(digits, kind)(2)

    def drawn(task: Any, rng: torch.Generator) -> Tensor:
        cast = {"policy": Painter(lambda asked: torch.randn(len(asked), *SHAPE, generator=rng))}
        parts = [task.collect(cast, {}, rng, 6) for _ in range(3)]
        return torch.cat([torch.cat([p.context["condition"][:, None], p["image"].flatten(1)], 1) for p in parts])

    task, again, rng, stream = made(), made(), torch.Generator().manual_seed(0), torch.Generator()
    drawn(task, rng)
    state = task.state_dict()
    stream.set_state(rng.get_state())
    expected = drawn(task, rng)
    again.load_state_dict(state)
    assert torch.equal(drawn(again, stream), expected)


# Operations


def test_operations_are_what_their_names_say() -> None:
    image = torch.arange(4.0).view(1, 1, 2, 2)
    expected = {
        "flip_lr": [[1, 0], [3, 2]],
        "flip_ud": [[2, 3], [0, 1]],
        "rot90": [[1, 3], [0, 2]],
        "invert": [[0, -1], [-2, -3]],
    }
    for name, apply in OPERATIONS.items():
        assert apply(image)[0, 0].tolist() == expected[name], name
    every = edited(image.expand(4, -1, -1, -1), torch.tensor([3, 0, 2, 1]))
    names = list(OPERATIONS)
    assert every[:, 0].tolist() == [expected[names[i]] for i in (3, 0, 2, 1)]


# Measures


def evaluated(task: Any, paint: Callable[[TensorDict], Tensor]) -> dict[str, float]:
    evaluation = task.evaluate({"policy": Painter(paint)}, {}, torch.Generator().manual_seed(0))
    for samples in evaluation.samples.values():
        assert 0 < len(samples) <= 200
        assert samples.shape[1:] == SHAPE
    return dict(evaluation.metrics)


def test_generation_is_perfect_for_real_digits_and_chance_for_any(digits: DigitsWorld) -> None:
    by_class = [digits.train[digits.train_labels == label] for label in range(CLASSES)]

    def real(contexts: TensorDict) -> Tensor:
        return torch.stack([by_class[label][i % 40] for i, label in enumerate(contexts["condition"].tolist())])

    good = evaluated(digits.generation(4), real)
    assert good["accuracy"] > 0.97
    assert good["judge_probability"] > 0.97
    assert good["distance_to_real"] < 1e-3
    other = evaluated(
        digits.generation(4), lambda c: real(c.exclude().set("condition", (c["condition"] + 1) % CLASSES))
    )
    assert other["accuracy"] < 0.02
    assert other["judge_probability"] < 0.02
    one = evaluated(digits.generation(4), lambda c: by_class[3][:1].expand(len(c), -1, -1, -1))
    assert one["accuracy"] == pytest.approx(0.1)


def test_editing_is_perfect_for_the_exact_edit_and_nothing_for_the_source(digits: DigitsWorld) -> None:
    task = digits.editing(4)
    exact = evaluated(task, lambda c: edited(c["reference"], c["condition"] - CLASSES))
    # Where two operations give one image, the first of them wins the tie.
    assert exact["success"] > 0.99
    assert exact["fidelity"] == 1
    assert exact["distance_to_target"] == 0
    lazy = evaluated(task, lambda c: c["reference"])
    assert lazy["success"] <= 0.3
    assert lazy["distance_to_target"] > 0.3
    wrong = evaluated(task, lambda c: edited(c["reference"], (c["condition"] - CLASSES + 1) % 4))
    assert wrong["success"] < 0.01


def test_evaluation_uses_digits_that_training_does_not(digits: DigitsWorld) -> None:
    seen: list[Tensor] = []
    evaluated(digits.editing(4), lambda c: (seen.append(c["reference"]), c["reference"])[1])
    assert set(rows_of(seen[0])) <= set(rows_of(digits.held_out))
    assert set(rows_of(digits.editing(4).rows["reference"])) == set(rows_of(digits.train))


def test_an_image_that_pleases_the_judge_and_is_no_digit_is_far_from_real_ones(digits: DigitsWorld) -> None:
    """Random search against the judge: the distance to the nearest real digit shows what it found."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(20_000, *SHAPE, generator=rng) * 2 - 1
    best = digits.judge(noise)[:, 3].topk(20).indices
    adversarial, real = noise[best], digits.held_out[digits.held_out_labels == 3]
    assert digits.judge(adversarial)[:, 3].min() > 0.9
    assert nearest_distance(adversarial, digits.train).min() > 1.5 * nearest_distance(real, digits.train).max()
    assert nearest_distance(digits.train[:5], digits.train).max() < 1e-2


def test_tasks_share_their_contexts(digits: DigitsWorld) -> None:
    rng = torch.Generator().manual_seed(0)
    cast = {"policy": digits.policy(0)}
    knobs = {"sampling_steps": 2.0, "noise_level": 0.7, "guidance": 1.0}
    both = Rollout.cat(
        [digits.generation(2).collect(cast, knobs, rng, 4), digits.editing(2).collect(cast, knobs, rng, 4)]
    )
    assert both.task_names == ("generate", "edit")
    edits = both.of_task("edit")
    target = edit_target(edits)
    assert EditReward(lambda _: target).score(edits.with_columns(image=target), Scene()).tolist() == [1.0] * 4
