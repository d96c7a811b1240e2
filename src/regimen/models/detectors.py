"""Networks that find objects in images: for rewards that judge what a picture shows, and for its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regimen.functions.geneval import Detections
from regimen.functions.scenes import CELL, CELLS, COLOURS, KINDS, OBJECTS, cell_boxes, draw_scenes

# GenEval's colours as RGB in [0, 1], in the order of `regimen.functions.geneval.COLOURS`.
COLOUR_VALUES = (
    (0.9, 0.1, 0.1), (1.0, 0.55, 0.0), (0.95, 0.9, 0.15), (0.1, 0.6, 0.2), (0.15, 0.3, 0.85),
    (0.5, 0.15, 0.6), (1.0, 0.6, 0.75), (0.45, 0.28, 0.15), (0.05, 0.05, 0.05), (0.95, 0.95, 0.95),
)  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CellDetector(nn.Module):
    """A small convolutional network that says what each cell of a scene holds; see `regimen.functions.scenes`.

    It is a judge: soft, fitted, and so to be deceived, which an exact rule that evaluates will show.
    """

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, hidden, CELL, CELL),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, 1 + OBJECTS, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 16, 17]` of every cell's content for images `[B, 3, 32, 32]` in [-1, 1]."""
        logits: Tensor = self.network(images).flatten(2).mT
        return logits

    def fit(self, rng: torch.Generator, steps: int = 300, batch: int = 64, noise: float = 0.5) -> CellDetector:
        """Learn from rendered scenes under noise of deviations up to `noise`, on the CPU; then freeze; returns self."""
        self.requires_grad_(True)
        optimiser = torch.optim.AdamW(self.parameters(), 3e-3)
        with torch.enable_grad():
            for _ in range(steps):
                content = 1 + torch.randint(OBJECTS, (batch, CELLS), generator=rng)
                scenes = torch.where(torch.rand(batch, CELLS, generator=rng) < 0.5, content, 0)
                images = draw_scenes(scenes)
                level = noise * torch.rand(batch, 1, 1, 1, generator=rng)
                logits = self(images + level * torch.randn(images.shape, generator=rng))
                optimiser.zero_grad()
                F.cross_entropy(logits.flatten(0, 1), scenes.flatten()).backward()
                optimiser.step()
        self.requires_grad_(False)
        return self

    @torch.no_grad()
    def detect(self, images: Tensor) -> Detections:
        """What is in each of the 16 cells: the likeliest kind and colour, and the probability that there is any."""
        chances = self.to(images.device)(images).softmax(-1)
        objects = chances[..., 1:].unflatten(-1, (len(KINDS), len(COLOURS)))
        box = cell_boxes().to(images).expand(len(images), -1, -1)
        return Detections(objects.sum(-1).argmax(-1), objects.sum(-2).argmax(-1), box, 1 - chances[..., 0])


class DetectorFromTransformers:
    """An object detector of `transformers` for images `[B, 3, H, W]` in [0, 1].

    It takes any model whose output has `logits [B, Q, classes]` and `pred_boxes [B, Q, 4]` (centre, width and height
    as shares of the image): DETR, YOLOS, RT-DETR, OWL-ViT. Colours are the nearest of a palette to the mean over
    the middle of the box; GenEval itself asks CLIP, for which give a `colour`.

    Args:
        model: such as `DetrForObjectDetection` or `OwlViTForObjectDetection`; it is frozen.
        size: height and width that images are resized to.
        softmax: classes exclude one another and the last one is "no object" (DETR, YOLOS); otherwise each has a
            probability of its own (RT-DETR, OWL-ViT).
        text: for an open-vocabulary model, `input_ids` and `attention_mask` `[classes, L]` of its queries; the
            classes are then these.
        colour: `(images, boxes in pixels [B, Q, 4]) -> int64 [B, Q]`.
        palette: RGB `[colours, 3]` in [0, 1].
        mean, std: per channel, of the model's images.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: tuple[int, int] = (800, 800),
        softmax: bool = True,
        text: Mapping[str, Tensor] | None = None,
        colour: Callable[[Tensor, Tensor], Tensor] | None = None,
        palette: Sequence[Sequence[float]] = COLOUR_VALUES,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.size, self.softmax, self.text, self.colour = size, softmax, text, colour
        self.palette, self.mean, self.std = torch.tensor(palette), torch.tensor(mean), torch.tensor(std)

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> Self:
        """A detector with classes of its own, from a folder or hub name; `options` are this class's.

        Raises:
            ImportError: the model needs a package that is not installed (DETR's backbones: timm).
        """
        from transformers import AutoModelForObjectDetection

        try:
            model = AutoModelForObjectDetection.from_pretrained(path)
        except ImportError as error:
            why = " ".join(str(error).split())
            raise ImportError(
                f"DetectorFromTransformers: {path} needs more: pip install 'regimen-rl[judges]' ({why})"
            ) from error
        return cls(model, **options)

    @property
    def labels(self) -> list[str]:
        """Names of the model's classes, in order (not those of an open-vocabulary model's queries)."""
        names: Mapping[int, str] = self.model.config.id2label
        return [names[index] for index in sorted(names)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Detections:
        """What the model finds, with boxes in pixels of the images given."""
        self.model.to(images.device)
        resized = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True, align_corners=False)
        pixels = (resized - self.mean.to(images).view(-1, 1, 1)) / self.std.to(images).view(-1, 1, 1)
        queries = {k: v.to(images.device).repeat(len(images), 1) for k, v in (self.text or {}).items()}
        output = self.model(pixel_values=pixels.to(self.model.dtype), **queries)
        logits = output.logits.float()
        chances = logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()
        score, label = chances.max(-1)
        centre, extent = output.pred_boxes.float().split(2, -1)
        scale = images.new_tensor([images.shape[3], images.shape[2]] * 2)
        box = torch.cat([centre - extent / 2, centre + extent / 2], -1) * scale
        colour = self._nearest_colour if self.colour is None else self.colour
        return Detections(label, colour(images, box), box, score)

    def _nearest_colour(self, images: Tensor, box: Tensor, points: int = 5) -> Tensor:
        """The palette's colour nearest to the mean over a grid of points in the middle half of each box."""
        share = torch.linspace(0.25, 0.75, points, device=images.device)
        grid = torch.stack(torch.meshgrid(share, share, indexing="xy"), -1).flatten(0, 1)
        scale = images.new_tensor([images.shape[3], images.shape[2]])
        where = (box[..., None, :2] + grid * (box[..., None, 2:] - box[..., None, :2])) / scale * 2 - 1
        seen = F.grid_sample(images.float(), where, padding_mode="border", align_corners=False).mean(-1).mT
        return (seen[:, :, None] - self.palette.to(images)).square().sum(-1).argmin(-1)
