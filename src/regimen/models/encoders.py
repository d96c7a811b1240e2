"""Multimodal language models that a `MetaQueryConditioner` can put its queries to.

An encoder is asked twice: `embed` turns a prompt (and an image) into input embeddings, `run` takes
embeddings, to which the conditioner has appended its queries, through the model once. Both here are causal:
a prompt's own hidden states do not depend on what is appended, so what the model understood stays as it
was.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Patches, Sinusoid, TransformerBlock

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MultimodalEncoder(Protocol):
    """What a `MetaQueryConditioner` needs of a language model, which must be a module too.

    Attributes:
        hidden: size of input embeddings and of hidden states.
        null_token: the token that an empty prompt is made of.
    """

    hidden: int
    null_token: int

    def embed(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        image: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input embeddings `[B, N, hidden]`, bool mask `[B, N]` and positions `[B, N]` or `[3, B, N]` of a
        prompt.

        `prompt_ids` int64 and `prompt_mask` bool are `[B, L]`, padded on either side; `image [B, C, H, W]`
        is in [0, 1] and `has_image` bool `[B]` tells which rows have one (default: all).
        """
        ...

    def run(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states `[B, N, hidden]` of input embeddings `[B, N, hidden]`."""
        ...


def positions_of(mask: Tensor) -> Tensor:
    """Positions `[B, N]` counted over the tokens of a bool mask `[B, N]`, whichever side it is padded on."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class SmallMultimodalEncoder(nn.Module):
    """A causal transformer over image patches, then prompt tokens: the language model of the built-in
    tasks.

    Args:
        vocab: number of tokens.
        dim: hidden size.
        layers: transformer blocks.
        heads: attention heads.
        image_shape: size (C, H, W) of prompt images.
        patch: side of an image token's patch.
        null_token: the token that an empty prompt is made of.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        patch: int = 4,
        null_token: int = 0,
    ) -> None:
        super().__init__()
        self.hidden, self.null_token, self.image_shape = dim, null_token, tuple(image_shape)
        self.token = nn.Embedding(vocab, dim)
        self.patches = Patches(image_shape, patch)
        self.image = nn.Linear(self.patches.size, dim)
        self.position = Sinusoid(dim, low=1e-3, high=1.0)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, 4 * dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def embed(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        image: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `MultimodalEncoder.embed`; the image's tokens stand in front of the prompt's.

        Raises:
            ValueError: the image is of another size than `image_shape`.
        """
        embeds, mask = self.token(prompt_ids), prompt_mask.bool()
        if image is not None:
            if image.shape[1:] != self.image_shape:
                size = tuple(image.shape[1:])
                raise ValueError(f"prompt image has size {size} and should have {self.image_shape}")
            seen = mask.new_ones(mask.shape[0]) if has_image is None else has_image.bool()
            image = image.masked_fill(~seen.view(-1, 1, 1, 1), 0.0).to(embeds.dtype)
            embeds = torch.cat([self.image(self.patches(image)), embeds], dim=1)
            mask = torch.cat([seen.unsqueeze(1).expand(-1, self.patches.count), mask], dim=1)
        return embeds, mask, positions_of(mask)

    def run(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """See `MultimodalEncoder.run`."""
        size = embeds.shape[1]
        # A padding token must see something, itself, or its softmax has no entries.
        itself = torch.eye(size, dtype=torch.bool, device=mask.device)
        seen = (torch.ones_like(itself).tril() & mask.unsqueeze(1)) | itself
        x = embeds + self.position(positions).to(embeds.dtype)
        for block in self.blocks:
            x = block(x, seen.unsqueeze(1))
        out: Tensor = self.norm(x)
        return out


class TransformersEncoder(nn.Module):
    """A causal language model of `transformers`, with a vision tower or without, as a `MultimodalEncoder`.

    Prompts that hold the model's image tokens have them filled in, as many as the image makes; prompts
    without get the image in front (between the model's vision start and end tokens, where it has them).
    Images are in [0, 1] and are resized and normalised here: for models of the Qwen-VL kind to the nearest
    whole number of merged patches, for others to the vision tower's own size.

    Args:
        model: such as `Qwen2ForCausalLM` or `Qwen2_5_VLForConditionalGeneration`; its language head is not
            used.
        null_token: the token of an empty prompt; default the model's bos, pad or eos token, or 0.
        image_mean: per channel, subtracted from images.
        image_std: per channel, divides images.

    Raises:
        ValueError: (in `embed`) an image for a model without a vision tower, for a model that feeds its
            images into later layers too (Qwen3-VL's deepstack), or a prompt with the wrong number of image
            tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        null_token: int | None = None,
        image_mean: tuple[float, ...] = CLIP_MEAN,
        image_std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.model: Any = getattr(model, "base_model", model)
        self.config: Any = self.model.config
        text = self.config.get_text_config()
        self.hidden: int = text.hidden_size
        known = (null_token, text.bos_token_id, text.pad_token_id, text.eos_token_id, 0)
        self.null_token: int = next(token for token in known if isinstance(token, int))
        self.image_mean, self.image_std = image_mean, image_std

    def embed(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        image: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `MultimodalEncoder.embed`."""
        ids, mask = prompt_ids, prompt_mask.bool()
        if image is None:
            return self.model.get_input_embeddings()(ids), mask, positions_of(mask)
        features, grid = self._image_features(image)
        token = self.config.image_token_id
        if not bool((ids == token).any()):
            ids, mask = self._with_image_tokens(ids, mask, features.shape[1], has_image)
        places = ids == token
        rows = places.any(1)
        if bool((places.sum(1)[rows] != features.shape[1]).any()):
            raise ValueError(
                f"prompts hold {places.sum(1).tolist()} image tokens ({token}); an image of "
                f"{tuple(image.shape[2:])} makes {features.shape[1]}"
            )
        embeds = self.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(places.unsqueeze(-1), features[rows].to(embeds.dtype))
        if grid is None or not hasattr(self.model, "get_rope_index"):
            return embeds, mask, positions_of(mask)
        positions, _ = self.model.get_rope_index(
            ids, mm_token_type_ids=places.int(), image_grid_thw=grid[rows], attention_mask=mask
        )
        return embeds, mask, positions

    def run(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """See `MultimodalEncoder.run`."""
        output = self.model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _image_features(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image tokens `[B, n, hidden]`, and the grids `[B, 3]` of patches where the model asks for them."""
        vision, name = getattr(self.config, "vision_config", None), type(self.model).__name__
        if vision is None:
            raise ValueError(f"{name} has no vision tower; leave prompt_image out of the context")
        merge = getattr(vision, "spatial_merge_size", None)
        if merge is None:
            grid, pixels = None, self._normalised(image, vision.image_size, vision.image_size)
            found = self.model.get_image_features(pixel_values=pixels)
        else:
            unit = merge * vision.patch_size
            height, width = (max(round(size / unit), 1) * unit for size in image.shape[2:])
            pixels = merged_patches(
                self._normalised(image, height, width), vision.patch_size, merge, vision.temporal_patch_size
            )
            size = [1, height // vision.patch_size, width // vision.patch_size]
            grid = torch.tensor([size], device=image.device).repeat(image.shape[0], 1)
            found = self.model.get_image_features(pixel_values=pixels, image_grid_thw=grid)
        if getattr(found, "deepstack_features", None):
            raise ValueError(f"{name} feeds images into its later layers too, which is not supported")
        return torch.stack(list(getattr(found, "pooler_output", found))), grid

    def _normalised(self, image: Tensor, height: int, width: int) -> Tensor:
        if image.shape[1] == 1:
            image = image.expand(-1, len(self.image_mean), -1, -1)
        if image.shape[2:] != (height, width):
            resized = F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True)
            image = resized.clamp(0, 1)
        mean, std = (image.new_tensor(value).view(-1, 1, 1) for value in (self.image_mean, self.image_std))
        pixels: Tensor = ((image - mean) / std).to(self.model.dtype)
        return pixels

    def _with_image_tokens(
        self, ids: Tensor, mask: Tensor, count: int, has_image: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        start, end = (getattr(self.config, f"vision_{side}_token_id", None) for side in ("start", "end"))
        front = [token for token in (start, *[self.config.image_token_id] * count, end) if token is not None]
        rows = ids.shape[0]
        seen = mask.new_ones(rows) if has_image is None else has_image.bool()
        ids = torch.cat([ids.new_tensor(front).expand(rows, -1), ids], dim=1)
        return ids, torch.cat([seen.unsqueeze(1).expand(-1, len(front)), mask], dim=1)


def merged_patches(image: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Images `[B, C, H, W]` as the patch rows a Qwen-VL vision tower reads.

    Returns `[B * (H/patch) * (W/patch), C * frames * patch^2]`: patches that the tower merges (merge x
    merge) follow one another, and a still image stands for `frames` equal frames.
    """
    batch, channels, height, width = image.shape
    unit = merge * patch
    split = image.reshape(batch, channels, height // unit, merge, patch, width // unit, merge, patch)
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4).unsqueeze(2)
    return ordered.expand(-1, -1, frames, -1, -1).flatten(1)
