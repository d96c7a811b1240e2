"""Stable Diffusion 3 on photographs and captions: the image tasks at their real scale.

A context is four numbers per sample: `prompt` (a row of the world's `texts`), `source` and `target` (rows of its
`paths`, -1 for none) and `requirements [R, 6]` (GenEval's demands; 0 for edits). Texts and pictures stay in Python;
what a text encoder or the autoencoder makes of them is computed when it is needed, and kept for a while.
Images are in [0, 1]. `diffusers` and `peft` are imported when a world is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.geneval import Detections, geneval_score, requirements_from_metadata
from regimen.functions.images import closeness
from regimen.models.sd3 import SD3Denoiser
from regimen.models.sd3_pipeline import SD3Conditioner, frozen_sd3, save_only_trained
from regimen.policies.flow import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask
from regimen.tasks.text import read_records

Detector = Callable[[Tensor], Detections]

GENEVAL_NAMES = {"mouse": "computer mouse", "keyboard": "computer keyboard", "remote": "tv remote"}
"""What GenEval calls classes that COCO's detectors call otherwise."""


class StableDiffusionWorld:
    """A pipeline of `diffusers` with adapters, prompts and edits to train it on, and an evaluator.

    Attributes:
        texts: all prompts, captions and instructions; paths: all images.
        frozen: the pipeline's text encoders and autoencoder.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Path,
        edits: str | Path,
        *,
        pairs: str | Path | None = None,
        evaluator: Detector | None = None,
        judge: Detector | None = None,
        labels: Sequence[str] | None = None,
        resolution: int = 512,
        held_out: int = 64,
        rank: int = 32,
        alpha: float = 64,
        guidance: float = 4.5,
        sampling_steps: int = 10,
        evaluation_steps: int = 40,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Read the files and load the pipeline but for its transformer.

        Files have one JSON object per line, and paths relative to the file. The last `held_out` lines of prompts
        and edits are for evaluation only.

        Args:
            model: folder or hub name of a `StableDiffusion3Pipeline`; text encoders may be absent.
            prompts: GenEval's metadata: `{"prompt", "include": [{"class", "count", ...}], "exclude"}`.
            edits: `{"source": image, "instruction", "target": image}`; lines without a target are not evaluated.
            pairs: to train on with supervision: `{"image", "caption"}`, with `"source": image` for edits.
            evaluator: finds objects in images `[B, 3, H, W]`; it must not be the judge that trains.
            judge: the one that trains, of which the evaluation reports what it thinks.
            labels: names of the detectors' classes; default their `labels`, in GenEval's words.
            resolution: side of the images.
            rank, alpha: of the adapters.
            guidance, sampling_steps, evaluation_steps: see `FlowPolicy`.
            dtype: of all weights.

        Raises:
            ImportError: diffusers is not installed.
            ValueError: a file has too few lines, or lacks what it should have; judge and evaluator have different
                numbers for a class that is asked for.
        """
        self.model, self.dtype, self.lora = model, dtype, (rank, alpha)
        self.guidance, self.sampling_steps, self.evaluation_steps = guidance, sampling_steps, evaluation_steps
        self.evaluator, self.judge = evaluator, judge
        self.texts: list[str] = []
        self.paths: list[Path] = []
        records = read_records(prompts, held_out, "prompt", "include")
        demands = _demands(records, [labels] if labels else [_labels(d) for d in (evaluator, judge) if d is not None])
        captions = self._contexts([r["prompt"] for r in records], demands)
        lines, folder = read_records(edits, held_out, "source", "instruction"), Path(edits).parent
        changes = self._contexts(
            [r["instruction"] for r in lines],
            torch.zeros_like(demands[:1]).expand(len(lines), -1, -1),
            [folder / r["source"] for r in lines],
            [folder / r["target"] if r.get("target") else None for r in lines],
        )
        self.captions, self.held_out_captions = (
            captions[: len(captions) - held_out],
            captions[len(captions) - held_out :],
        )
        self.edits, self.held_out_edits = changes[: len(changes) - held_out], changes[len(changes) - held_out :]
        self.pairs = None if pairs is None else self._pairs(Path(pairs), demands[:1])
        self.frozen = frozen_sd3(model, self.texts, self.paths, resolution, dtype)

    def policy(self, seed: int) -> FlowPolicy:
        """The pipeline's transformer with fresh adapters, which alone are trained and saved."""
        torch.manual_seed(seed)
        denoiser = SD3Denoiser.from_pretrained(self.model, torch_dtype=self.dtype).lora(*self.lora)
        policy = FlowPolicy(
            denoiser,
            (denoiser.transformer.config.in_channels, *self.frozen.latent_size),
            conditioner=SD3Conditioner(self.frozen),
            decode=self.frozen.decode,
            shift=self.frozen.shift,
            guidance=self.guidance,
            sampling_steps=self.sampling_steps,
            evaluation_steps=self.evaluation_steps,
        )
        return save_only_trained(policy)

    def supervised(self, name: str, wrong: float) -> DatasetTask:
        """Images with their captions, and edits with their instructions, for flow matching on latents.

        A share `wrong` of the texts is replaced by that of another line, anew at every draw.

        Raises:
            ValueError: the world was made without pairs.
        """
        if self.pairs is None:
            raise ValueError("StableDiffusionWorld.supervised needs pairs; give the world a file of them (pairs=...)")
        prompts = self.pairs["context", "prompt"]

        def pair(rows: TensorDict, rng: torch.Generator) -> TensorDict:
            other = torch.randint(len(prompts), (len(rows),), generator=rng, device=rng.device)
            spoilt = torch.rand(len(rows), generator=rng, device=rng.device) < wrong
            context = rows["context"].copy()
            context["prompt"] = torch.where(spoilt, prompts.to(rng.device)[other], context["prompt"])
            latents = self.frozen.latents(rows["image"].tolist(), rng.device)
            return TensorDict({"image": latents, "context": context}, batch_size=[len(rows)])

        return DatasetTask(name, self.pairs, transform=pair)

    def generation(self, group_size: int, evaluated: str | None = None) -> PromptTask:
        """Draw what the prompt says."""
        evaluate = self._evaluate_generation
        return PromptTask("generate", self.captions, group_size=group_size, evaluate=evaluate, evaluated=evaluated)

    def editing(self, group_size: int, evaluated: str | None = None) -> PromptTask:
        """Change an image as the instruction says."""
        evaluate = self._evaluate_editing
        return PromptTask("edit", self.edits, group_size=group_size, evaluate=evaluate, evaluated=evaluated)

    def sources(self, rollout: Rollout) -> Tensor:
        """The images that a rollout's edits started from, `[B, 3, H, W]` in [0, 1]; black where there is none."""
        return self.frozen.images(rollout.context["source"].tolist(), rollout.mask.device)

    def targets(self, rollout: Rollout) -> Tensor:
        """The images that a rollout's edits should give, `[B, 3, H, W]` in [0, 1]; black where none is known."""
        return self.frozen.images(rollout.context["target"].tolist(), rollout.mask.device)

    def instructions(self, rollout: Rollout) -> list[str]:
        """The texts of a rollout's samples."""
        return [self.texts[index] for index in rollout.context["prompt"].tolist()]

    def _evaluate_generation(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Share of prompts of which the evaluator finds everything, and of their demands; what the judge thinks."""
        asked = self.held_out_captions.to(rng.device)
        images = policy.sample(asked, knobs, rng)["image"]
        metrics = {}
        if self.evaluator is not None:
            graded, strict = geneval_score(self.evaluator(images), asked["requirements"])
            metrics = {"accuracy": float(strict.float().mean()), "graded": float(graded.mean())}
        if self.judge is not None:
            metrics["judge_probability"] = float(geneval_score(self.judge(images), asked["requirements"])[0].mean())
        texts = [self.texts[index] for index in asked["prompt"].tolist()]
        return Evaluation(metrics, {"images": images[:32] * 2 - 1, "prompts": texts[:32]})

    def _evaluate_editing(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Share of results that are nearer to the target than to the source, and their distance to the target."""
        known = self.held_out_edits[self.held_out_edits["target"] >= 0].to(rng.device)
        if not len(known):
            return Evaluation({})
        images = policy.sample(known, knobs, rng)["image"]
        source, target = (self.frozen.images(known[key].tolist(), rng.device) for key in ("source", "target"))
        to_target, to_source = ((images - other).square().flatten(1).mean(1) for other in (target, source))
        metrics = {
            "success": float((to_target < to_source).float().mean()),
            "fidelity": float(closeness(images, target).mean()),
            "distance_to_target": float(to_target.sqrt().mean()),
        }
        shown = torch.stack([source, images, target], 1)[:16].flatten(0, 1) * 2 - 1
        return Evaluation(metrics, {"source_result_target": shown})

    def _pairs(self, path: Path, demands: Tensor) -> TensorDict:
        lines = read_records(path, 0, "image", "caption")
        context = self._contexts(
            [r["caption"] for r in lines],
            torch.zeros_like(demands).expand(len(lines), -1, -1),
            [path.parent / r["source"] if r.get("source") else None for r in lines],
        )
        image = torch.tensor([self._path(path.parent / r["image"]) for r in lines])
        return TensorDict({"image": image, "context": context}, batch_size=[len(lines)])

    def _contexts(
        self,
        texts: Sequence[str],
        requirements: Tensor,
        sources: Sequence[Path | None] | None = None,
        targets: Sequence[Path | None] | None = None,
    ) -> TensorDict:
        first = len(self.texts)
        self.texts.extend(texts)
        columns = {
            "prompt": torch.arange(first, len(self.texts)),
            "source": torch.tensor([self._path(path) for path in sources or [None] * len(texts)]),
            "target": torch.tensor([self._path(path) for path in targets or [None] * len(texts)]),
        }
        return TensorDict(columns | {"requirements": requirements.contiguous()}, batch_size=[len(texts)])

    def _path(self, path: Path | None) -> int:
        if path is None:
            return -1
        self.paths.append(path)
        return len(self.paths) - 1


def _labels(detector: Detector) -> list[str]:
    """A detector's classes as GenEval calls them."""
    return [GENEVAL_NAMES.get(name, name) for name in getattr(detector, "labels", ())]


def _demands(records: Sequence[Mapping[str, Any]], lists: Sequence[Sequence[str]]) -> Tensor:
    """Requirements of GenEval's records, which must be the same numbers for every list of classes."""
    tables = [requirements_from_metadata(records, names) for names in lists or [()]]
    for other in tables[1:]:
        rows = (other != tables[0]).flatten(1).any(1).nonzero()
        if len(rows):
            raise ValueError(
                "StableDiffusionWorld: evaluator and judge have different numbers for a class that is asked for in "
                f"prompt {int(rows[0])} ('{records[int(rows[0])]['prompt']}'); expected detectors of the same classes"
            )
    return tables[0]
