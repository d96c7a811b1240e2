"""Real handwritten digits (8 x 8, scikit-learn) to be filled in, extended, or freed of a blob, by one policy.

Images are `[1, 8, 8]` in [-1, 1]. A context is `masked`, the image with 0 inside the mask; `mask [1, 8, 8]`, 1 where
pixels are to be made; and `condition`: the class to draw (fill), or 10 (extend) or 11 (remove).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, one_hot

from regimen.functions.images import nearest_distance
from regimen.models.classifiers import ImageClassifier
from regimen.models.comparators import Criteria, EncoderComparator, Questions, Told, labelled_pairs, preference
from regimen.models.inpainting import InpaintingDenoiser
from regimen.models.mlp_denoiser import MLPDenoiser
from regimen.policies.flow import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask
from regimen.tasks.side_by_side import SideBySide

TaskName = Literal["fill", "extend", "remove"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
CRITERIA = Criteria(
    {
        "fill": ("alignment", "consistency", "structure"),
        "extend": ("consistency", "structure"),
        "remove": ("removal",),
    }
)
SHAPE, CLASSES = (1, 8, 8), 10
CONDITIONS = CLASSES + 2
CANDIDATES = ("image", "prediction", "reference_image")
BLOB = 3


def border_jump(image: Tensor, mask: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels on either side of a mask's border, `[B]`, of images `[B, C, H, W]`."""
    total, count = image.new_zeros(len(image)), image.new_zeros(len(image))
    for axis in (2, 3):
        across = (mask.diff(dim=axis) != 0).to(image.dtype)
        total += (image.diff(dim=axis).abs() * across).flatten(1).sum(1)
        count += across.flatten(1).sum(1)
    return total / count


def ring(mask: Tensor) -> Tensor:
    """The pixels that touch a mask `[B, 1, H, W]` from outside, corners included."""
    return max_pool2d(mask, 3, 1, 1) - mask


def removal_quality(image: Tensor, mask: Tensor) -> Tensor:
    """`-|mean inside the mask - mean of the ring around it| - 0.03 border_jump`, `[B]`; the image alone shows both."""

    def mean(where: Tensor) -> Tensor:
        return (image * where).flatten(1).sum(1) / where.flatten(1).sum(1)

    return -(mean(mask) - mean(ring(mask))).abs() - 0.03 * border_jump(image, mask)


class Rater:
    """The true judge of images, by each criterion; larger is better.

    `alignment` is a classifier's probability of the class asked for; `consistency` the border's jump, negative;
    `structure` the distance to the nearest real digit, negative; `removal` is `removal_quality`.
    """

    def __init__(self, classifier: ImageClassifier, real: Tensor) -> None:
        self.classifier, self.real = classifier, real

    def __call__(self, questions: Questions, images: Tensor) -> Tensor:
        """How good images `[R, 1, 8, 8]` are, `[R]`."""
        scores = images.new_zeros(len(images))
        for name in dict.fromkeys(questions.criterion):
            rows = _rows(questions, name)
            scores[rows] = self._score(name, images[rows], questions.context[rows])
        return scores

    def _score(self, criterion: str, images: Tensor, context: TensorDict) -> Tensor:
        if criterion == "alignment":
            return self.classifier(images).gather(1, context["condition"][:, None])[:, 0]
        if criterion == "consistency":
            return -border_jump(images, context["mask"])
        if criterion == "structure":
            return -nearest_distance(images, self.real)
        return removal_quality(images, context["mask"])


class InpaintingEncoder(nn.Module):
    """A candidate beside its masked image, mask and prompt, to features `[R, hidden]`: a perceptron of two layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        told = len(CRITERIA.of_tasks) + len(CRITERIA.names)
        inputs = 3 * torch.Size(SHAPE).numel() + CLASSES + told
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())

    def forward(self, candidate: Tensor, context: TensorDict, condition: Tensor) -> Tensor:
        """Features of candidates `[R, 1, 8, 8]`."""
        # Of the condition only the class: what the task is, the judge is told, or not.
        asked = one_hot(context["condition"], CONDITIONS)[:, :CLASSES].to(candidate.dtype)
        images = torch.cat([candidate, context["masked"], context["mask"]], 1).flatten(1)
        features: Tensor = self.layers(torch.cat([images, asked, condition], 1))
        return features


class InpaintingWorld:
    """The data, split by seed, with a rater that labels and one that evaluates.

    Attributes:
        annotator: the rater that labels; its classifier, a neural network, is fitted on split A.
        evaluator: the same with a logistic regression fitted on split B.
        train, held_out: images `[N, 1, 8, 8]`.
        width, hidden: of its denoisers and judges.
        wrong_labels: share of the labels that are turned around.
    """

    tasks: Sequence[str] = TASKS

    def __init__(
        self, seed: int, held_out: int = 360, *, width: int = 128, hidden: int = 128, wrong_labels: float = 0.1
    ) -> None:
        self.width, self.hidden, self.wrong_labels = width, hidden, wrong_labels
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().view(-1, *SHAPE) / 8 - 1
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, train = order[:held_out], order[held_out:]
        self.held_out, self.held_out_labels = images[test], labels[test]
        self.train, self.train_labels = images[train], labels[train]
        a, b = train[::2], train[1::2]
        network = MLPClassifier((64,), alpha=1e-2, max_iter=150, tol=2e-3, random_state=seed)
        self.annotator = Rater(ImageClassifier(network).fit(images[a], labels[a]), self.train)
        linear = ImageClassifier(LogisticRegression(C=0.1, max_iter=500)).fit(images[b], labels[b])
        self.evaluator = Rater(linear, self.train)

    def policy(self, seed: int) -> FlowPolicy:
        """A small denoiser with random weights; its sampler has no noise."""
        torch.manual_seed(seed)
        channels = 2 * SHAPE[0] + 1
        network = MLPDenoiser((channels, *SHAPE[1:]), CONDITIONS, self.width)
        denoiser = InpaintingDenoiser(network)
        return FlowPolicy(denoiser, SHAPE, sampling_steps=12, evaluation_steps=12, noise_level=0.0)

    def judge(self, seed: int, told: Told = ("task", "criterion")) -> EncoderComparator:
        """A small judge of pairs with random weights."""
        torch.manual_seed(seed + 1)
        return EncoderComparator(InpaintingEncoder(self.hidden), self.hidden, CRITERIA, told)

    def labelled(self) -> list[SideBySide]:
        """What judges start to learn from: labelled samples of every task."""
        return [self.task(name) for name in TASKS]

    def supervised(self, task: TaskName | None, wrong: float) -> DatasetTask:
        """Images to learn from, of one task or of all, anew at every draw.

        Of the classes asked for in filling a share `wrong` is another.
        """

        def example(rows: TensorDict, rng: torch.Generator) -> TensorDict:
            count = len(rows)
            kinds = torch.full((count,), 0 if task is None else TASKS.index(task), device=rng.device)
            if task is None:
                kinds = torch.randint(len(TASKS), (count,), generator=rng, device=rng.device)
            spoilt = torch.rand(count, generator=rng, device=rng.device) < wrong
            shift = torch.randint(1, CLASSES, (count,), generator=rng, device=rng.device)
            label = torch.where(spoilt, (rows["label"] + shift) % CLASSES, rows["label"])
            context = contexts(rows["image"], label, kinds, rng)
            return TensorDict({"image": rows["image"], "context": context}, batch_size=[count], device=rows.device)

        rows = TensorDict({"image": self.train, "label": self.train_labels}, batch_size=[len(self.train)])
        return DatasetTask(f"{task or 'all'}_data", rows, transform=example)

    def task(self, name: TaskName, *, evaluated: str = "policy", judge: str = "reward_model") -> SideBySide:
        """One task, whose samples are labelled: of sample, prediction and reference the best and the worst.

        Args:
            name: of the task.
            evaluated: the member that is measured against the member `base`.
            judge: the comparator whose accuracy is measured.
        """
        rng = torch.Generator().manual_seed(TASKS.index(name))
        kinds = torch.full((len(self.train),), TASKS.index(name))
        rows = contexts(self.train, self.train_labels, kinds, rng)

        def annotate(rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
            shown = [rollout[column] for column in CANDIDATES]
            return labelled_pairs(CRITERIA, self.annotator, rollout, shown, self.wrong_labels, rng)

        def measure(cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
            return self._measure(name, cast[evaluated], cast["base"], cast[judge], knobs, rng)

        return SideBySide(PromptTask(name, rows, evaluated=evaluated), annotate=annotate, evaluate=measure)

    @torch.no_grad()
    def _measure(
        self,
        task: TaskName,
        policy: FlowPolicy,
        base: FlowPolicy,
        judge: EncoderComparator,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Evaluation:
        """How often the true rater prefers a policy to the base, by each criterion, on images that were held out.

        Metrics: `<criterion>`, share of wins (ties count half), `win`, their mean; `judge_accuracy`, how often the
        judge agrees with the rater about the same pairs; `distance_to_real`.
        """
        kinds = torch.full((len(self.held_out),), TASKS.index(task))
        fixed = torch.Generator().manual_seed(len(TASKS) + TASKS.index(task))
        asked = contexts(self.held_out, self.held_out_labels, kinds, fixed).to(rng.device)
        rollout = Rollout(policy.sample(asked, knobs, rng).data, (task,))
        ours, theirs = rollout["image"].cpu(), base.sample(asked, knobs, rng)["image"].cpu()
        questions = CRITERIA.questions(rollout.to("cpu"))
        a, b = ours[questions.row], theirs[questions.row]
        won = self._won(questions, a, b)
        wins = {name: float(won[_rows(questions, name)].mean()) for name in CRITERIA.of_tasks[task]}
        device = rollout.mask.device
        said = preference(judge, questions, a.to(device), b.to(device)).cpu()
        decided = won != 0.5
        metrics = {
            **wins,
            "win": sum(wins.values()) / len(wins),
            "judge_accuracy": float(((said > 0.5) == (won > 0.5))[decided].float().mean()) if decided.any() else 0.5,
            "distance_to_real": float(nearest_distance(ours, self.train).mean()),
        }
        shown = torch.stack([asked["masked"].cpu(), ours, theirs], 1)
        return Evaluation(metrics, {"masked_policy_base": shown[:32].flatten(0, 1)})

    def _won(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        """1 where `a` is better, 1/2 where the two are as good, `[R]`."""
        ours, theirs = self.evaluator(questions, a), self.evaluator(questions, b)
        return (ours > theirs).float() + (ours == theirs).float() / 2


def _rows(questions: Questions, criterion: str) -> Tensor:
    return torch.tensor([name == criterion for name in questions.criterion])


def contexts(images: Tensor, labels: Tensor, kinds: Tensor, rng: torch.Generator) -> TensorDict:
    """What is asked about images `[B, 1, 8, 8]` of classes `[B]`, by task (int64 `[B]`, an index into `TASKS`).

    Fill masks the centre, extend the right half, remove a blob at a random place, which hides what is below it.
    """
    count, device = len(images), images.device
    high, wide = SHAPE[1:]
    y, x = torch.arange(high, device=device).view(1, 1, high, 1), torch.arange(wide, device=device).view(1, 1, 1, wide)
    top, left = torch.randint(high - BLOB + 1, (2, count, 1, 1, 1), generator=rng, device=rng.device).to(device)
    centre = (y >= 2) & (y < 6) & (x >= 2) & (x < 6)
    half = (x >= wide // 2) & (y >= 0)
    blob = (y >= top) & (y < top + BLOB) & (x >= left) & (x < left + BLOB)
    kind = kinds.view(-1, 1, 1, 1)
    mask = torch.where(kind == 0, centre, torch.where(kind == 1, half, blob)).float()
    condition = torch.where(kinds == 0, labels, CLASSES - 1 + kinds)
    fields = {"masked": images * (1 - mask), "mask": mask, "condition": condition}
    return TensorDict(fields, batch_size=[count], device=device)


def names() -> list[str]:
    """`<task>/<criterion>` of every criterion of every task."""
    return [f"{task}/{criterion}" for task in TASKS for criterion in CRITERIA.of_tasks[task]]
