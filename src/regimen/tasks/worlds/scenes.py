"""Scenes of coloured shapes (32 x 32, RGB) to be generated from captions and edited by instruction.

Images are `[3, 32, 32]` in [-1, 1], see `regimen.functions.scenes`; prompts are words, see `scene_prompts`. A context
is `prompt_ids`, `prompt_mask`, `reference [3, 32, 32]`, `has_reference`, `requirements [2, 6]` (what the caption
demands; 0 for edits) and `target [16]` (the scene that an edit should give; empty for captions): both tasks have
all of them, so that they can share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.functions.geneval import geneval_score
from regimen.functions.images import closeness
from regimen.functions.scenes import CELLS, COLOURS, KINDS, SHAPE, draw_scenes, read_detections, read_scenes
from regimen.models.detectors import CellDetector
from regimen.models.encoders import SmallMultimodalEncoder
from regimen.models.kontext_denoiser import KontextDenoiser
from regimen.models.metaquery import MetaQueryConditioner, MetaQueryConnector
from regimen.models.prompts import TextEmbedding
from regimen.policies.flow import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask
from regimen.tasks.worlds.scene_prompts import LENGTH, WORDS, sample_captions, sample_edits, texts

Size = Literal["tiny", "small", "large"]
Conditioner = Literal["embedding", "metaquery"]

DENOISERS: dict[str, dict[str, int]] = {
    "tiny": {"patch": 8, "dim": 32, "layers": 1, "heads": 2},
    "small": {"patch": 4, "dim": 64, "layers": 3, "heads": 4},
    "large": {"patch": 4, "dim": 256, "layers": 5, "heads": 8},
}
"""Settings of `KontextDenoiser` by size; "large" has 6.4 million parameters."""

CLOSENESS = 40.0
"""Scale of `closeness` for edits: a missing square halves it more than twice, a slightly noisy image does not."""

_CONTEXT = ("prompt_ids", "prompt_mask", "requirements", "target")


class ScenesWorld:
    """Captions and edits drawn by seed, a judge fitted on renderings, and an exact rule that evaluates.

    Attributes:
        judge: a small network fitted on noisy renderings; its `detect` is for `GenEvalReward`. Evaluation never
            uses it but to report what it thinks.
        pairs: what policies may be trained on, as many captions as edits; `held_out_captions`, `held_out_edits`:
            what they are evaluated on. No held-out edit is among the pairs; of the captions there are so few that
            most are.
    """

    def __init__(
        self,
        seed: int,
        size: Size = "large",
        conditioner: Conditioner = "embedding",
        rows: int = 8192,
        held_out: int = 240,
        evaluation_steps: int = 40,
    ) -> None:
        """Draw the world.

        Args:
            seed: of captions, scenes and judge.
            size: of the policy's denoiser, see `DENOISERS`.
            conditioner: `"embedding"` of the words, trained with the denoiser; or `"metaquery"`: a connector's
                queries to a frozen random language model.
            rows: training pairs.
            held_out: prompts that each task is evaluated on.
            evaluation_steps: denoising steps in evaluation.

        Raises:
            ValueError: an unknown size or conditioner.
        """
        if size not in DENOISERS or conditioner not in ("embedding", "metaquery"):
            raise ValueError(
                f"ScenesWorld: size '{size}', conditioner '{conditioner}'; expected {', '.join(DENOISERS)}; "
                "embedding or metaquery"
            )
        self.size, self.conditioner, self.evaluation_steps = size, conditioner, evaluation_steps
        rng = torch.Generator().manual_seed(seed)
        self.pairs: Any = torch.cat([sample_captions(rows // 2, rng), sample_edits(rows // 2, rng)])
        self.held_out_captions = sample_captions(held_out, rng)
        self.held_out_edits = unseen_edits(held_out, self.pairs, rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.judge = CellDetector().fit(rng)

    def policy(self, seed: int) -> FlowPolicy:
        """A token transformer with reference tokens, and random weights."""
        torch.manual_seed(seed)
        settings = DENOISERS[self.size]
        dim = settings["dim"]
        denoiser = KontextDenoiser(SHAPE, 0, prompt_dim=dim, pooled_dim=dim, **settings)
        return FlowPolicy(
            denoiser,
            SHAPE,
            conditioner=self._conditioner(dim),
            sampling_steps=10,
            evaluation_steps=self.evaluation_steps,
        )

    def _conditioner(self, dim: int) -> nn.Module:
        if self.conditioner == "embedding":
            return TextEmbedding(len(WORDS), LENGTH, dim)
        encoder = SmallMultimodalEncoder(len(WORDS), dim=dim, image_shape=SHAPE, patch=8)
        connector = MetaQueryConnector(LENGTH, dim, dim, 2, 4, 2 * dim, prompt_dim=dim, pooled_dim=dim)
        return MetaQueryConditioner(encoder, connector)

    def supervised(self, name: str, wrong: float) -> DatasetTask:
        """Pairs for flow matching: captions with a scene, and edits with their result.

        A share `wrong` of the prompts is replaced by that of another row of the same kind, anew at every draw.
        """
        half = len(self.pairs) // 2
        ids, mask = self.pairs["prompt_ids"], self.pairs["prompt_mask"]

        def pair(rows: TensorDict, rng: torch.Generator) -> TensorDict:
            count = len(rows)
            other = torch.randint(half, (count,), generator=rng, device=rng.device) + half * rows["edit"]
            spoilt = torch.rand(count, generator=rng, device=rng.device) < wrong
            context = contexts(rows)
            for key, column in (("prompt_ids", ids), ("prompt_mask", mask)):
                context[key] = torch.where(spoilt[:, None], column.to(rng.device)[other], context[key])
            return TensorDict({"image": draw_scenes(rows["target"]), "context": context}, batch_size=[count])

        return DatasetTask(name, self.pairs, transform=pair)

    def generation(self, group_size: int, evaluated: str | None = None) -> PromptTask:
        """Draw a scene that the caption fits."""
        rows = contexts(self.pairs[: len(self.pairs) // 2])
        return PromptTask(
            "generate", rows, group_size=group_size, evaluate=self._evaluate_generation, evaluated=evaluated
        )

    def editing(self, group_size: int, evaluated: str | None = None) -> PromptTask:
        """Change a scene as the instruction says, and nothing else."""
        rows = contexts(self.pairs[len(self.pairs) // 2 :])
        return PromptTask("edit", rows, group_size=group_size, evaluate=self._evaluate_editing, evaluated=evaluated)

    def _evaluate_generation(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Whether the rule finds what the caption demands, and how far images are from clean renderings."""
        asked = contexts(self.held_out_captions)
        images = policy.sample(asked.to(rng.device), knobs, rng)["image"].cpu()
        graded, strict = geneval_score(read_detections(images), asked["requirements"])
        clean = draw_scenes(read_scenes(images))
        judged, _ = geneval_score(self.judge.detect(images), asked["requirements"])
        metrics = {
            "accuracy": float(strict.float().mean()),
            "graded": float(graded.mean()),
            "distance_to_real": float((images - clean).square().flatten(1).mean(1).sqrt().mean()),
            "judge_probability": float(judged.mean()),
        }
        return Evaluation(metrics, {"images": images[:48], "captions": texts(asked["prompt_ids"][:48])})

    def _evaluate_editing(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Share of held-out scenes in which the rule reads exactly the result asked for, in every cell."""
        asked = contexts(self.held_out_edits)
        images = policy.sample(asked.to(rng.device), knobs, rng)["image"].cpu()
        target = draw_scenes(asked["target"])
        metrics = {
            "success": float((read_scenes(images) == asked["target"]).all(1).float().mean()),
            "fidelity": float(closeness(images, target, CLOSENESS).mean()),
            "distance_to_target": float((images - target).square().flatten(1).mean(1).sqrt().mean()),
        }
        shown = torch.stack([asked["reference"], images, target], 1)[:32].flatten(0, 1)
        return Evaluation(metrics, {"source_result_target": shown, "instructions": texts(asked["prompt_ids"][:32])})

    def __repr__(self) -> str:
        return f"ScenesWorld({len(KINDS)} kinds, {len(COLOURS)} colours, {CELLS} cells, size={self.size!r})"


def unseen_edits(count: int, seen: TensorDict, rng: torch.Generator) -> TensorDict:
    """A table of `count` edits, as `sample_edits` draws them, of which none is a row of the table `seen`."""
    rows, known = sample_edits(count, rng), _asked(seen)
    while bool((again := (_asked(rows)[:, None] == known).all(2).any(1)).any()):
        # The same rows of a fresh table, so that the operations keep their equal parts.
        rows[again] = sample_edits(count, rng)[again]
    return rows


def _asked(rows: TensorDict) -> Tensor:
    return torch.cat([rows["prompt_ids"], rows["source"]], 1)


def contexts(rows: TensorDict) -> TensorDict:
    """What the policy is given for rows of a table of prompts, see `scene_prompts`."""
    there = {"reference": draw_scenes(rows["source"]), "has_reference": rows["edit"]}
    shown = torch.where(rows["edit"][:, None], rows["target"], 0)
    table = {key: rows[key] for key in _CONTEXT} | {"target": shown} | there
    return TensorDict(table, batch_size=rows.batch_size, device=rows.device)


def edit_target(rollout: Rollout) -> Tensor:
    """The exact result `[B, 3, 32, 32]` of every edit asked for in a rollout."""
    return draw_scenes(rollout.context["target"])
