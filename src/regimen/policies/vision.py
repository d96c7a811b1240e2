"""Images for vision-language policies: what the model reads beside tokens, and where it stands in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

import torch
from tensordict import TensorDict
from torch import Tensor

IMAGE = "<|image_pad|>"
MARK = f"<|vision_start|>{IMAGE}<|vision_end|>"


class Processor(Protocol):
    """Turns the images of contexts into what a vision-language model reads."""

    def __call__(self, contexts: TensorDict) -> dict[str, Tensor]:
        """What the model reads beside tokens, by name, each `[B, n, ...]`."""
        ...

    def mark(self, prompt: str) -> str:
        """The prompt with one placeholder per image, in the images' order."""
        ...

    def counts(self, inputs: dict[str, Tensor]) -> Tensor:
        """int64 `[B, images]`, how many tokens each image is, given what `__call__` returned."""
        ...

    def save_pretrained(self, path: Path | str) -> None:
        """Write it beside the model."""
        ...


class QwenVLImages:
    """One image per context, for the models of the Qwen2-VL family (2, 2.5 and 3).

    A prompt that does not say where its image goes (`<|image_pad|>`) begins with it.
    """

    def __init__(self, processor: Any, column: str = "image") -> None:
        """Make a processor.

        Args:
            processor: the model's image processor of `transformers`; it resizes and normalises.
            column: entry of the contexts, `[B, 3, H, W]` in [0, 1].
        """
        self.processor, self.column = processor, column

    @classmethod
    def from_pretrained(cls, path: Path | str, column: str = "image") -> Self:
        """The image processor of a model's folder or hub name."""
        from transformers import AutoImageProcessor

        return cls(AutoImageProcessor.from_pretrained(path), column)

    def save_pretrained(self, path: Path | str) -> None:
        """Write the image processor as `transformers` stores it."""
        self.processor.save_pretrained(path)

    def __call__(self, contexts: TensorDict) -> dict[str, Tensor]:
        """`pixel_values [B, patches, D]` and `image_grid_thw [B, 1, 3]`, on the contexts' device.

        Raises:
            ValueError: the contexts have no such images.
        """
        images = contexts.get(self.column, None)
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            found = list(images.shape) if isinstance(images, Tensor) else sorted(contexts.keys())
            raise ValueError(
                f"QwenVLImages: contexts need '{self.column}' of shape [B, 3, H, W] in [0, 1], found {found}; name it "
                "in the task's shown=[...], or give column= the name that it has"
            )
        pictures = (images.clamp(0, 1) * 255).round().byte().cpu().numpy()
        made = self.processor(images=list(pictures), input_data_format="channels_first", return_tensors="pt")
        names = ("pixel_values", "image_grid_thw")
        return {name: made[name].unflatten(0, (len(images), -1)).to(images.device) for name in names}

    def mark(self, prompt: str) -> str:
        """The prompt with its placeholder."""
        return prompt if IMAGE in prompt else MARK + prompt

    def counts(self, inputs: dict[str, Tensor]) -> Tensor:
        """int64 `[B, 1]`: patches, of which the model merges `merge_size` times `merge_size` into a token."""
        counts: Tensor = inputs["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        return counts


def expand_placeholders(ids: Tensor, placeholder: int, counts: Tensor) -> Tensor:
    """The tokens with every placeholder repeated as often as its image has tokens.

    Args:
        ids: int64 `[L]`.
        placeholder: the token.
        counts: int64 `[images]`.

    Raises:
        ValueError: there are not as many placeholders as images.
    """
    places = ids == placeholder
    if int(places.sum()) != len(counts):
        raise ValueError(
            f"the prompt has {int(places.sum())} image placeholders (token {placeholder}), expected {len(counts)}, one "
            "per image; check the prompt for placeholders of its own, and that the tokenizer is the model's"
        )
    repeats = torch.ones_like(ids)
    repeats[places] = counts.to(ids)
    return ids.repeat_interleave(repeats)
