"""A causal language model of `transformers`, with or without vision, as hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from regimen.models.dense import product
from regimen.models.kv_cache import RowsCache
from regimen.models.llama_forward import LlamaForward

IMPOSSIBLE = -1e9
"""Logit of a token that is never said: finite, so that entropy and KL are, whatever the temperature."""
ATTENTION = ("eager", "sdpa")
LAYERS = ("full_attention", "sliding_attention")


class CausalLM(nn.Module):
    """Hidden states and logits of a `transformers` causal language model, text-only or with images.

    It is always in evaluation mode: dropout would make a sample's ratio to itself differ from 1. A state of a model
    with adapters holds the adapters, and of the weights under them only what is trained.

    Attributes:
        model: an `AutoModelForCausalLM` or `AutoModelForImageTextToText`, or a `peft` model around one.
    """

    model: Any
    placeholders: Tensor

    def __init__(self, model: nn.Module) -> None:
        """Take a model.

        Raises:
            ValueError: it keeps more than keys and values of what it has read, or its logits are not those of its
                output layer.
        """
        super().__init__()
        self.model = model
        # Where images stand in a prompt. Said by the model, they would ask for images that are not there.
        names = ("image_token_id", "video_token_id")
        tokens = [token for name in names if (token := getattr(self.base.config, name, None)) is not None]
        self.register_buffer("placeholders", torch.tensor(tokens, dtype=torch.int64), persistent=False)
        self._forward = self._known()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_forgive_frozen)
        self.eval()
        self._check_class()

    @classmethod
    def from_pretrained(cls, path: Path | str, *, lora_rank: int | None = None, **options: Any) -> Self:
        """A model from a folder or a name on the Hugging Face hub.

        Args:
            path: of a model, or of adapters, which are loaded onto the model they were trained for and can be
                trained on (extra `peft`).
            lora_rank: adds adapters of this rank, see `lora`.
            options: of the `from_pretrained` of `transformers`: `dtype`, `attn_implementation`, ...

        Raises:
            ImportError: `peft` is needed and not installed.
            ValueError: the adapters do not say of which model they are, or are to be added to.
        """
        network = cls(_load_adapted(path, options) if _holds_adapters(path) else _load(path, options))
        return network if lora_rank is None else network.lora(lora_rank, 2.0 * lora_rank)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def base(self) -> Any:
        """The `transformers` model itself, without adapters around it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def config(self) -> Any:
        """Of the language model (its text part, where it has vision)."""
        return self.base.config.get_text_config()

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
            mask: bool `[B, keys]`, real tokens, those in the cache included; all by default. Needed where padding
                stands before real tokens, and with images.
            visible: bool `[B, L, keys]`, which token sees which, in place of the causal mask.
            positions: see `positions`, which finds them by default.
            cache: keys and values of what came before; what is computed now is added to it.
            images: what a processor made of the images (`pixel_values`, `image_grid_thw`, ...), each `[B, n, ...]`.

        Raises:
            ValueError: `visible` for a model whose attention does not take it.
        """
        if visible is None and not images and (forward := self.forward_pass) is not None:
            return forward.grid(ids, mask, positions, cache)
        return self.plain_hidden(ids, mask, visible, positions, cache, images)

    @property
    def forward_pass(self) -> LlamaForward | None:
        """One of our own that is equal to that of `transformers` and faster, for a model that it knows."""
        return self._forward if self._forward is not None and self._forward.applies else None

    def plain_hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        cache: RowsCache | None = None,
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`hidden` by the forward pass of `transformers`."""
        if positions is None and (mask is not None or images):
            positions = self.positions(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, ids, images)
        if visible is not None:
            mask = self._heads_mask(visible)
        elif mask is None and cache is None and positions is not None:
            # Without a mask, `transformers` takes positions that do not rise by one for sequences packed in a row.
            mask = torch.ones_like(ids, dtype=torch.bool)
        found = self.base.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None, return_dict=True, **_flat(images),
        )  # fmt: skip
        states: Tensor = found.last_hidden_state
        return states

    def positions(self, mask: Tensor, ids: Tensor, images: Mapping[str, Tensor] | None) -> Tensor:
        """Positions of tokens, int64 `[B, L]`, or `[3, B, L]` where the model counts images in time, height and width.

        Args:
            mask: bool `[B, L]`, real tokens.
            ids: int64 `[B, L]`.
            images: see `hidden`.
        """
        if images and hasattr(self.base.base_model, "get_rope_index"):
            places = (ids == self.base.config.image_token_id).int()
            grid = images["image_grid_thw"].flatten(0, 1)
            found: Tensor = self.base.base_model.get_rope_index(
                ids, mm_token_type_ids=places, image_grid_thw=grid, attention_mask=mask
            )[0]
            return found
        return (mask.long().cumsum(1) - 1).clamp(min=0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`, in float32 or better."""
        head = self.base.get_output_embeddings()
        plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
        found: Tensor = product(hidden, head.weight, head.bias) if plain else head(hidden)
        found, config = found.to(torch.promote_types(found.dtype, torch.float32)), self.config
        if scale := getattr(config, "logit_scale", None):
            found = found * scale
        if scale := getattr(config, "logits_scaling", None):
            found = found / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            found = cap * torch.tanh(found / cap)
        return found.index_fill_(-1, self.placeholders, IMPOSSIBLE) if len(self.placeholders) else found

    def _heads_mask(self, visible: Tensor) -> Tensor:
        """`[B, 1, L, keys]` as the attention implementation wants it."""
        name, window = self.config._attn_implementation, getattr(self.config, "sliding_window", None)
        if name not in ATTENTION or (window is not None and visible.shape[-1] > window):
            raise ValueError(
                f"CausalLM: 'visible' was given for {visible.shape[-1]} tokens; expected attn_implementation one of "
                f"{', '.join(ATTENTION)} (it is {name}) and no more tokens than sliding_window ({window}); load the "
                "model with attn_implementation='sdpa', or leave 'visible' out"
            )
        wide = visible[:, None]
        if name == "sdpa":
            return wide
        dtype = next(self.parameters()).dtype
        return torch.zeros(wide.shape, dtype=dtype, device=wide.device).masked_fill(~wide, torch.finfo(dtype).min)

    @torch.no_grad()
    def _check_class(self) -> None:
        name = type(self.base).__name__
        odd = sorted(set(getattr(self.config, "layer_types", None) or ()) - set(LAYERS))
        if odd:
            raise ValueError(
                f"CausalLM: {name} has layers of type {', '.join(odd)}; expected {' or '.join(LAYERS)}: the sampler "
                "keeps keys and values of what was read, and such layers need more"
            )
        ids = torch.ones(1, 1, dtype=torch.int64, device=next(self.parameters()).device)
        theirs, ours = self.base(ids, use_cache=False).logits.float(), self.logits(self.hidden(ids)).float()
        said = ours > IMPOSSIBLE
        if not torch.allclose(ours[said], theirs[said], rtol=0.02, atol=0.02 * float(theirs.std())):
            raise ValueError(
                f"CausalLM: {name} does more to its logits than is known here (logit_scale, logits_scaling, "
                "final_logit_softcapping); expected the logits of its output layer. Give a subclass of CausalLM whose "
                "logits() does the same"
            )

    def lora(self, rank: int = 16, alpha: float = 32.0, targets: str | list[str] = "all-linear") -> Self:
        """Freeze the weights and add LoRA adapters, which start at zero effect; returns self. Extra `peft`.

        Args:
            rank, alpha: the change of a weight is `alpha / rank * B A`.
            targets: names of the layers, see `peft`.

        Raises:
            ImportError: `peft` is not installed.
            ValueError: there are adapters already.
        """
        peft = _peft()
        if self.has_adapters:
            raise ValueError("CausalLM.lora: the model has adapters already; load it without them, or train those")
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(self.model, settings)
        self._forward = self._known()
        self.eval()
        return self

    def _known(self) -> LlamaForward | None:
        return LlamaForward(self.base.base_model) if LlamaForward.knows(self.base.base_model) else None

    @property
    def has_adapters(self) -> bool:
        """Whether it is a `peft` model."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """The base weights while in this context.

        Raises:
            ValueError: there are no adapters.
        """
        if not self.has_adapters:
            raise ValueError("CausalLM.adapters_disabled: there are no adapters; add them with lora()")
        trainable = {id(p) for p in self.parameters() if p.requires_grad}
        try:
            with self.model.disable_adapter():
                yield
        finally:
            # Switching adapters makes peft set requires_grad, so frozen ones would come back trainable.
            for parameter in self.parameters():
                parameter.requires_grad_(id(parameter) in trainable)


def _load(path: Path | str, options: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(path, **options)
    return model


def _holds_adapters(path: Path | str) -> bool:
    return (Path(path) / "adapter_config.json").exists()


def _load_adapted(path: Path | str, options: Mapping[str, Any]) -> nn.Module:
    peft = _peft()
    base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(
            f"{path} holds adapters, and does not say of which model (base_model_name_or_path in adapter_config.json); "
            "name its folder there"
        )
    model: nn.Module = peft.PeftModel.from_pretrained(_load(base, options), path, is_trainable=True)
    return model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'regimen-rl[peft]'") from error
    return peft


def _flat(images: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: value.flatten(0, 1) for name, value in (images or {}).items()}


def _frozen(network: CausalLM) -> list[str]:
    """Names of the weights under adapters that are not trained themselves."""
    if not network.has_adapters:
        return []
    added = (network.model.base_model.prefix, "modules_to_save")
    named = network.named_parameters(remove_duplicate=False)
    return [name for name, p in named if not p.requires_grad and not any(part in name for part in added)]


def _drop_frozen(network: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave frozen weights out of a state."""
    for name in _frozen(network):
        state.pop(prefix + name, None)


def _forgive_frozen(network: Any, keys: Any) -> None:
    """Do not miss frozen weights in a state that is loaded."""
    # The network may be a part of the module that is loaded, whose name then stands before the weights' own.
    frozen = tuple(_frozen(network))
    keys.missing_keys[:] = [key for key in keys.missing_keys if not (frozen and key.endswith(frozen))]
