"""A causal language model of `transformers`, with or without vision, as hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from regimen.models.kv_cache import RowsCache

PROJECTIONS = "all-linear"


class CausalLM(nn.Module):
    """Hidden states and logits of any `transformers` causal language model, text-only or with images.

    Attributes:
        model: an `AutoModelForCausalLM` or `AutoModelForImageTextToText`, or a `peft` model around one.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Dropout would make a sample's ratio to itself differ from 1.
        self.eval()

    @property
    def base(self) -> Any:
        """The `transformers` model itself, without adapters around it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def config(self) -> Any:
        """Of the language model (its text part, where it has vision)."""
        return self.base.config.get_text_config()

    def new_cache(self, capacity: int) -> RowsCache:
        """An empty cache for sequences of up to `capacity` tokens."""
        return RowsCache(self.config.num_hidden_layers, capacity)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        cache: RowsCache | None = None,
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states `[B, L, D]` of tokens int64 `[B, L]`.

        Args:
            ids: the tokens; with a `cache`, those after what it holds.
            mask: bool `[B, L]`, real tokens; all by default. Only needed where padding stands before real tokens.
            visible: bool `[B, L, keys]`, which token sees which, in place of the causal mask.
            positions: int64 `[B, L]` (or `[3, B, L]` with vision); from the mask by default.
            cache: keys and values of what came before; what is computed now is added to it.
            images: what a processor made of the images (`pixel_values`, `image_grid_thw`, ...), each `[B, n, ...]`
                with as many entries for every sample.
        """
        inputs: dict[str, Any] = {"attention_mask": mask if visible is None else self._heads_mask(visible)}
        if positions is not None:
            inputs["position_ids"] = positions
        elif mask is not None and not images:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        if images:
            inputs |= {name: value.flatten(0, 1) for name, value in images.items()}
            inputs["mm_token_type_ids"] = (ids == self.base.config.image_token_id).int()
        found = self.base.base_model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None, return_dict=True, **inputs
        )
        states: Tensor = found.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
        found: Tensor = self.base.get_output_embeddings()(hidden)
        return found.float()

    def position_shift(self, rows: int, device: torch.device) -> Tensor | None:
        """By how much the positions after the last prompt differ from its length, `[B, 1]`, where images count less."""
        shift: Tensor | None = getattr(self.base.base_model, "rope_deltas", None)
        return None if shift is None else shift.to(device).expand(rows, 1)

    def _heads_mask(self, visible: Tensor) -> Tensor:
        """`[B, 1, L, keys]` as the attention implementation wants it."""
        wide = visible[:, None]
        if self.base.config._attn_implementation == "sdpa":
            return wide
        dtype = next(self.parameters()).dtype
        return torch.zeros(wide.shape, dtype=dtype, device=wide.device).masked_fill(~wide, torch.finfo(dtype).min)

    def lora(self, rank: int = 16, alpha: float = 32.0, targets: str | list[str] = PROJECTIONS) -> Self:
        """Freeze the weights and add LoRA adapters, which start at zero effect; returns self. Extra `peft`.

        Raises:
            ImportError: `peft` is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("CausalLM.lora needs peft: pip install 'regimen-rl[peft]'") from error
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, settings)
        self.eval()
        return self

    @property
    def has_adapters(self) -> bool:
        """Whether it is a `peft` model."""
        return hasattr(self.model, "peft_config")

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """The base weights while in this context.

        Raises:
            ValueError: there are no adapters.
        """
        if not self.has_adapters:
            raise ValueError("CausalLM.adapters_disabled: there are no adapters; add them with lora()")
        trainable = [p for p in self.parameters() if p.requires_grad]
        with self.model.disable_adapter():
            yield
        # Switching adapters makes peft set requires_grad, so frozen ones would come back trainable.
        kept = {id(p) for p in trainable}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in kept)
