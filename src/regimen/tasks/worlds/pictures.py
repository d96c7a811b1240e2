"""Pictures of a folder, to be filled in, extended, freed of an object or written on, by FLUX.1 Fill: OneReward's scale.

A context is numbers: those of `FluxFillConditioner`. Texts and pictures stay in Python; what a text encoder or the
autoencoder makes of them is computed when it is needed. Images are in [0, 1]. `diffusers` and `peft` are imported when
a world is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.models.adapters import add_adapters
from regimen.models.comparators import Comparator, Criteria, PastedComparator, Told, preference
from regimen.models.flux_fill import FluxFillDenoiser
from regimen.models.flux_fill_pipeline import FluxFillConditioner, frozen_flux
from regimen.models.generative_comparator import TEMPLATE, GenerativeComparator
from regimen.models.sd3_pipeline import save_only_trained
from regimen.policies.flow import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask
from regimen.tasks.side_by_side import SideBySide
from regimen.tasks.text import read_records

VISIBLE = ("alignment", "consistency", "structure", "aesthetics")
CRITERIA = Criteria({"fill": VISIBLE, "extend": VISIBLE, "remove": ("removal",), "text": VISIBLE})
TEMPLATES: dict[Told, str] = {
    ("task", "criterion"): TEMPLATE,
    (): "{text}Is the first image better than the second one? Answer Yes or No.",
}
"""A judge's question, by what it is told."""
REMOVE = "remove"
"""The prompt of every removal."""
BOXES = {"fill": ((0.3, 0.7), (0.3, 0.7)), "remove": ((0.2, 0.5), (0.2, 0.5)), "text": ((0.1, 0.3), (0.6, 0.9))}
"""Least and greatest height and width of a random mask, as shares of the picture."""
BORDERS = (0.25, 0.5)
"""Least and greatest share of a picture that is extended."""
LANGUAGE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The attention of a Qwen2-VL's language model; its vision tower's layers have other names."""


class PicturesWorld:
    """A fill pipeline of `diffusers` with adapters, pictures to train it on, labelled pairs, judges and an evaluator.

    Attributes:
        texts: all prompts; paths: all image files.
        frozen: the pipeline's text encoders and autoencoder.
        tasks: those that there are pictures for.
        rows, held_out: by task, contexts to train on, with `target` (the picture wanted), and to evaluate on.
        pairs, held_out_pairs: by task, labelled pairs: `better`, `worse` (numbers of pictures), `place` (of the
            criterion) and their `context`.
    """

    def __init__(
        self,
        seed: int,
        model: str | Path,
        pictures: str | Path,
        preferences: str | Path,
        judge: str | Path,
        evaluator: str | Path,
        *,
        resolution: int = 512,
        held_out: int = 64,
        rank: int = 32,
        alpha: float = 64,
        guidance: float = 4.0,
        negative: str = "nsfw",
        sampling_steps: int = 20,
        evaluation_steps: int = 50,
        dtype: torch.dtype = torch.bfloat16,
        evaluated_at_once: int = 4,
    ) -> None:
        """Read the files and load the pipeline but for its transformer.

        Files have one JSON object per line, and paths relative to the file. The last `held_out` lines of either are
        for evaluation only.

        Args:
            seed: of the random masks.
            model: folder or hub name of a `FluxFillPipeline`.
            pictures: a folder with `metadata.jsonl`: `{"file_name", "text"}`, and where there is one `"mask"` (an
                image, white where the object or the writing is; else the mask is random), `"words"` (what is written
                there) and `"target"` (the picture without the object; else itself).
            preferences: pairs labelled by people or by a judge: `{"task", "criterion", "better", "worse", "text"}`, and
                `"source"` and `"mask"` to show a judge the source's pixels outside the mask.
            judge: folder or hub name of a Qwen2-VL, the model that judges start from.
            evaluator: of another one, which is not trained, and decides who wins.
            resolution: side of the images.
            rank, alpha: of all adapters.
            guidance, negative, sampling_steps, evaluation_steps: see `FlowPolicy`; the negative prompt.
            dtype: of the pipeline's weights.
            evaluated_at_once: pictures or pairs.

        Raises:
            ImportError: diffusers or peft is not installed.
            ValueError: a file has too few lines, lacks what it should have, or names a criterion that is none of a
                task's.
        """
        self.model, self.judged_by, self.evaluated_by = model, str(judge), str(evaluator)
        self.lora, self.dtype, self.at_once = (rank, alpha), dtype, evaluated_at_once
        self.guidance, self.sampling_steps, self.evaluation_steps = guidance, sampling_steps, evaluation_steps
        self.texts: list[str] = [negative]
        self.paths: list[Path] = []
        self._numbers: dict[Path, int] = {}
        rng = torch.Generator().manual_seed(seed)
        records = read_records(Path(pictures, "metadata.jsonl"), held_out, "file_name", "text")
        split = len(records) - held_out
        self.rows = self._by_task(records[:split], Path(pictures), rng)
        self.held_out = self._by_task(records[split:], Path(pictures), rng)
        self.tasks = tuple(self.rows)
        if absent := [task for task in self.tasks if not len(self.held_out.get(task, ()))]:
            raise ValueError(
                f"PicturesWorld: of the last held_out={held_out} lines of {pictures}/metadata.jsonl none is for task "
                f"{', '.join(absent)}, and others are; expected at least one to evaluate on (text: with 'words')"
            )
        labels = _read_labels(preferences, held_out)
        split = len(labels) - held_out
        self.pairs, self.held_out_pairs = (
            self._labels(part, Path(preferences)) for part in (labels[:split], labels[split:])
        )
        self.frozen = frozen_flux(model, self.texts, self.paths, resolution, dtype)
        self.conditioner = FluxFillConditioner(self.frozen, negative=0)
        self._evaluator: PastedComparator | None = None

    def policy(self, seed: int) -> FlowPolicy:
        """The pipeline's transformer with fresh adapters, which alone are trained and saved."""
        torch.manual_seed(seed)
        denoiser = FluxFillDenoiser.from_pretrained(self.model, torch_dtype=self.dtype).lora(*self.lora)
        denoiser.transformer.enable_gradient_checkpointing()
        policy = FlowPolicy(
            denoiser,
            (self.frozen.vae.config.latent_channels, *self.frozen.latent_size),
            conditioner=self.conditioner,
            decode=self.frozen.decode,
            shift=self.frozen.shift,
            guidance=self.guidance,
            noise_level=0.0,
            sampling_steps=self.sampling_steps,
            evaluation_steps=self.evaluation_steps,
        )
        return save_only_trained(policy)

    def judge(self, seed: int, told: Told = ("task", "criterion")) -> PastedComparator:
        """A vision-language model with fresh adapters, which alone are trained and saved."""
        torch.manual_seed(seed + 1)
        judge = self._comparator(self.judged_by, TEMPLATES[told])
        add_adapters(judge.judge.model, *self.lora, LANGUAGE_PROJECTIONS, "PicturesWorld.judge")
        return save_only_trained(judge)

    def supervised(self, task: str | None, wrong: float) -> DatasetTask:
        """Pictures to learn from as they should be, of one task or of all; a share `wrong` has another row's prompt."""
        rows: TensorDict = TensorDict.cat([self.rows[name] for name in ([task] if task else self.tasks)])

        def example(drawn: TensorDict, rng: torch.Generator) -> TensorDict:
            context, count = drawn.copy(), len(drawn)
            other = torch.randint(len(rows), (count,), generator=rng, device=rng.device)
            spoilt = torch.rand(count, generator=rng, device=rng.device) < wrong
            context["prompt"] = torch.where(spoilt, rows["prompt"].to(rng.device)[other], context["prompt"])
            latents = self.frozen.latents(drawn["target"].tolist(), rng.device)
            return TensorDict({"image": latents, "context": context}, batch_size=[count])

        return DatasetTask(f"{task or 'all'}_data", rows, transform=example)

    def labelled(self) -> list[DatasetTask]:
        """The labelled pairs of every task, for `PairwiseVerdictObjective`."""

        def shown(rows: TensorDict, rng: torch.Generator) -> TensorDict:
            count, places = len(rows), len(CRITERIA.names)
            asked = torch.zeros(count, places, dtype=torch.bool, device=rng.device)
            asked[torch.arange(count), rows["place"]] = True
            columns = {"asked": asked, "label": asked.float(), "context": rows["context"]}
            for name, number in (("first", "better"), ("second", "worse")):
                images = self.frozen.images(rows[number].tolist(), rng.device)
                columns[name] = images[:, None] * asked.view(count, places, 1, 1, 1)
            return TensorDict(columns, batch_size=[count])

        return [DatasetTask(task, rows, transform=shown) for task, rows in self.pairs.items()]

    def task(self, name: str, *, evaluated: str = "policy", judge: str = "reward_model") -> SideBySide:
        """One task; nobody labels its samples.

        Args:
            name: of the task.
            evaluated: the member that is measured against the member `base`.
            judge: the comparator whose accuracy is measured.
        """

        def measure(cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
            return self._measure(name, cast[evaluated], cast["base"], cast[judge], knobs, rng)

        return SideBySide(PromptTask(name, self.rows[name], evaluated=evaluated), evaluate=measure)

    @torch.no_grad()
    def _measure(
        self,
        task: str,
        policy: FlowPolicy,
        base: FlowPolicy,
        judge: Comparator,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Evaluation:
        """How often the evaluator prefers a policy to the base, by each criterion, on pictures that were held out.

        Metrics: `<criterion>`, share of wins (ties count half), `win`, their mean; `judge_accuracy`, how often the
        judge agrees with labels that were held out, if there are any.
        """
        won: dict[str, list[float]] = {name: [] for name in CRITERIA.of_tasks[task]}
        shown = []
        for asked in self.held_out[task].to(rng.device).split(self.at_once):
            rollout = Rollout(policy.sample(asked, knobs, rng).data, (task,))
            ours, theirs = rollout["image"], base.sample(asked, knobs, rng)["image"]
            questions = CRITERIA.questions(rollout)
            said = preference(self.evaluator(rng.device), questions, ours[questions.row], theirs[questions.row])
            for name, value in zip(questions.criterion, said.tolist(), strict=True):
                won[name].append((value > 0.5) + (value == 0.5) / 2)
            shown.append(torch.stack([self.conditioner.pictures(asked), ours, theirs], 1).flatten(0, 1).cpu())
        metrics = {name: sum(values) / len(values) for name, values in won.items()}
        metrics["win"] = sum(metrics.values()) / len(metrics)
        if (right := self._agreement(task, judge, rng.device)) is not None:
            metrics["judge_accuracy"] = right
        return Evaluation(metrics, {"source_policy_base": torch.cat(shown)[:48] * 2 - 1})

    def _agreement(self, task: str, judge: Comparator, device: torch.device) -> float | None:
        """Share of the held-out pairs of a task of which a judge prefers the one that is labelled better."""
        if task not in self.held_out_pairs:
            return None
        right = []
        for rows in self.held_out_pairs[task].to(device).split(self.at_once):
            count = len(rows)
            rollout = Rollout.create(
                task=task,
                group=torch.arange(count, device=device),
                mask=torch.ones(count, 1, dtype=torch.bool, device=device),
                context=rows["context"],
            )
            asked = torch.arange(len(CRITERIA.names), device=device) == rows["place"][:, None]
            better, worse = (self.frozen.images(rows[name].tolist(), device) for name in ("better", "worse"))
            right.append(preference(judge, CRITERIA.questions(rollout, asked), better, worse) > 0.5)
        return float(torch.cat(right).float().mean())

    def evaluator(self, device: torch.device) -> Comparator:
        """The judge that decides who wins, loaded when it is first asked."""
        if self._evaluator is None:
            self._evaluator = self._comparator(self.evaluated_by, TEMPLATE).requires_grad_(False)
        return self._evaluator.to(device)

    def _comparator(self, name: str, template: str) -> PastedComparator:
        def texts(context: TensorDict) -> list[str]:
            return [f"The instruction was '{self.texts[row]}'. " for row in context["prompt"].tolist()]

        judge = GenerativeComparator.from_pretrained(name, CRITERIA, texts=texts, template=template)
        return PastedComparator(judge, lambda c: (self.conditioner.pictures(c), self.conditioner.mask(c)))

    def _by_task(
        self, records: Sequence[Mapping[str, Any]], folder: Path, rng: torch.Generator
    ) -> dict[str, TensorDict]:
        """What is asked about pictures, by task, and the picture wanted (`target`)."""
        written = [record for record in records if record.get("words")]
        captions, count = [record["text"] for record in records], len(records)
        asked = {"fill": (records, captions), "extend": (records, captions), "remove": (records, [REMOVE] * count)}
        if written:
            asked["text"] = (written, [f'the text "{record["words"]}"' for record in written])
        tables = {}
        for task, (chosen, prompts) in asked.items():
            files = [folder / record["file_name"] for record in chosen]
            masks = [None if task == "extend" else _beside(folder, record, "mask") for record in chosen]
            boxes = random_boxes(task, len(chosen), rng)
            tables[task] = self._contexts(prompts, files, masks, boxes)
            wanted = [_beside(folder, record, "target") if task == "remove" else None for record in chosen]
            targets = [self._path(path or file) for path, file in zip(wanted, files, strict=True)]
            tables[task]["target"] = torch.tensor(targets)
        return tables

    def _labels(self, records: Sequence[Mapping[str, Any]], path: Path) -> dict[str, TensorDict]:
        """Labelled pairs by task. Without a mask, a judge is shown the pictures as they are."""
        tables = {}
        for task in sorted({record["task"] for record in records}):
            chosen = [record for record in records if record["task"] == task]
            masks = [_beside(path.parent, record, "mask") for record in chosen]
            whole = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(len(chosen), -1)
            sources = [path.parent / record.get("source", record["better"]) for record in chosen]
            columns = {
                name: torch.tensor([self._path(path.parent / record[name]) for record in chosen])
                for name in ("better", "worse")
            }
            columns["place"] = torch.tensor([CRITERIA.names.index(record["criterion"]) for record in chosen])
            context = self._contexts([record["text"] for record in chosen], sources, masks, whole)
            tables[task] = TensorDict({**columns, "context": context}, batch_size=[len(chosen)])
        return tables

    def _contexts(
        self, prompts: Sequence[str], files: Sequence[Path], masks: Sequence[Path | None], boxes: Tensor
    ) -> TensorDict:
        first = len(self.texts)
        self.texts.extend(prompts)
        columns = {
            "prompt": torch.arange(first, len(self.texts)),
            "source": torch.tensor([self._path(file) for file in files]),
            "mask_file": torch.tensor([self._path(mask) for mask in masks]),
            "box": boxes.contiguous(),
        }
        return TensorDict(columns, batch_size=[len(prompts)])

    def _path(self, path: Path | None) -> int:
        if path is None:
            return -1
        number = self._numbers.setdefault(path, len(self.paths))
        if number == len(self.paths):
            self.paths.append(path)
        return number


def _read_labels(path: str | Path, held_out: int) -> list[dict[str, Any]]:
    records = read_records(path, held_out, "task", "criterion", "better", "worse", "text")
    for number, record in enumerate(records):
        try:
            CRITERIA.check(record["task"], record["criterion"])
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    return records


def random_boxes(task: str, count: int, rng: torch.Generator) -> Tensor:
    """Masks of a task, `[count, 4]`: top, bottom, left and right edge as shares of the picture.

    Extend masks one of the four sides, the others a rectangle somewhere.
    """
    size, place = torch.rand(2, 2, count, generator=rng)
    if task == "extend":
        share = BORDERS[0] + (BORDERS[1] - BORDERS[0]) * size[0]
        side = (place[0] * 4).long()
        edges = [1 - share, share, 1 - share, share]
        whole = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(count, 1)
        # Masked from below: the top edge moves; from above: the bottom edge; and so on.
        return whole.scatter(1, side[:, None], torch.stack(edges, 1).gather(1, side[:, None]))
    least, greatest = torch.tensor(BOXES[task]).T[..., None]
    extent = least + (greatest - least) * size
    start = place * (1 - extent)
    return torch.stack([start[0], start[0] + extent[0], start[1], start[1] + extent[1]], 1)


def _beside(folder: Path, record: Mapping[str, Any], field: str) -> Path | None:
    return folder / record[field] if record.get(field) else None
