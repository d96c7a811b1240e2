"""Stable Diffusion 3's text encoders, frozen, and what its denoiser reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Context, replaced, required
from .frozen_pipeline import FrozenPipeline

Module = TypeVar("Module", bound=nn.Module)


class SD3Texts:
    """The three text encoders of a pipeline; of one that is absent, the embeddings are zeros, as in the pipeline.

    Args:
        pipeline: a `diffusers.StableDiffusion3Pipeline`.
        pooled_size: size of the transformer's pooled prompt.
        prompt_size: size of its prompt tokens.
        t5_length: tokens of the third encoder.
    """

    def __init__(self, pipeline: Any, pooled_size: int, prompt_size: int, t5_length: int = 256) -> None:
        p = pipeline
        self.clips = [(p.tokenizer, p.text_encoder), (p.tokenizer_2, p.text_encoder_2)]
        self.t5 = (p.tokenizer_3, p.text_encoder_3)
        for module in (p.text_encoder, p.text_encoder_2, p.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval()
        self.pooled_size, self.prompt_size, self.t5_length = pooled_size, prompt_size, t5_length

    @torch.no_grad()
    def __call__(self, text: str, device: str) -> tuple[Tensor, Tensor]:
        """Prompt tokens `[L, D]` and pooled prompt `[P]`, as `StableDiffusion3Pipeline.encode_prompt` makes them."""
        widths = [None if model is None else model.config.projection_dim for _, model in self.clips]
        missing = self.pooled_size - sum(width or 0 for width in widths)
        hidden, pooled = [], []
        for tokenizer, model in self.clips:
            if model is None:
                hidden.append(torch.zeros(1, 77, missing, device=device))
                pooled.append(torch.zeros(1, missing, device=device))
                missing = 0
                continue
            ids = _ids(tokenizer, text, tokenizer.model_max_length, device)
            output = model.to(device)(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip = torch.cat(hidden, -1)
        clip = F.pad(clip, (0, self.prompt_size - clip.shape[-1]))
        return torch.cat([clip, self._t5(text, device).to(clip)], 1)[0], torch.cat(pooled, -1)[0]

    def _t5(self, text: str, device: str) -> Tensor:
        tokenizer, model = self.t5
        if model is None:
            return torch.zeros(1, self.t5_length, self.prompt_size, device=device)
        found: Tensor = model.to(device)(_ids(tokenizer, text, self.t5_length, device))[0]
        return found


def frozen_sd3(
    path: str | Path, texts: Sequence[str], paths: Sequence[Path], resolution: int, dtype: torch.dtype
) -> FrozenPipeline:
    """The frozen parts of a Stable Diffusion 3 pipeline's folder or hub name.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    except ImportError as error:
        raise ImportError("StableDiffusionWorld needs diffusers: pip install 'regimen-rl[diffusers]'") from error
    # diffusers loads a pipeline that was saved without some parts only if it is told that they are absent.
    listed = StableDiffusion3Pipeline.load_config(path)
    absent = {name: None for name, part in listed.items() if isinstance(part, list) and part[0] is None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, torch_dtype=dtype, **(absent | {"transformer": None}))
    config = SD3Transformer2DModel.load_config(path, subfolder="transformer")
    encoder = SD3Texts(pipeline, config["pooled_projection_dim"], config["joint_attention_dim"])
    return FrozenPipeline(encoder, pipeline.vae, texts, paths, resolution, float(pipeline.scheduler.config.shift))


class SD3Conditioner(nn.Module):
    """Adds what `SD3Denoiser` reads to contexts of numbers: `prompt` int64 `[B]` and `source` int64 `[B]` (-1: none).

    Added are `prompt_embeds`, `pooled` and those of the empty prompt, `reference` (latents of the source) and
    `has_reference`. It has no weights of its own.
    """

    def __init__(self, frozen: FrozenPipeline) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, context: Context) -> Context:
        """The context with the entries above added."""
        prompt, source = (required(context, key, "SD3Conditioner") for key in ("prompt", "source"))
        device = prompt.device
        prompt_embeds, pooled = self.frozen.prompts(prompt.tolist(), device)
        null_embeds, null_pooled = self.frozen.prompts([-1], device)
        return replaced(
            context,
            prompt_embeds=prompt_embeds,
            pooled=pooled,
            null_prompt_embeds=null_embeds.expand_as(prompt_embeds),
            null_pooled=null_pooled.expand_as(pooled),
            reference=self.frozen.latents(source.tolist(), device),
            has_reference=source >= 0,
        )


def save_only_trained(module: Module) -> Module:
    """Leave weights that are frozen now, and the buffers beside and below them, out of the module's saved state.

    The state then holds adapters alone. Loading it leaves the rest as it is. Returns the module.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    owners = {name: name[: name.rfind(".") + 1] for name, _ in module.named_buffers()}
    kept = {*trained, *(name for name, owner in owners.items() if any(t.startswith(owner) for t in trained))}
    there = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    frozen = (there & module.state_dict().keys()) - kept

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    def keep(loading: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        present = {**dict(loading.named_parameters()), **dict(loading.named_buffers())}
        for name in frozen:
            state.setdefault(prefix + name, present[name].detach())

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(keep)
    return module


def _ids(tokenizer: Any, text: str, length: int, device: str) -> Tensor:
    ids: Tensor = tokenizer(
        [text], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(device)
