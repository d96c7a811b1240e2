"""Low-rank adapters inside models of `diffusers` and `transformers`, by peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ATTENTION_PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
"""Of the transformers of Stable Diffusion 3 and FLUX."""


def add_adapters(model: Any, rank: int, alpha: float, targets: Sequence[str], owner: str) -> None:
    """Freeze a model's weights and add adapters, which start at zero effect (gaussian A, zero B).

    They are in single precision, whatever the model is: the steps of an optimiser are lost in a half-precision weight.

    Args:
        model: of `diffusers` or `transformers`.
        rank, alpha: the change of a weight is `alpha / rank * B A`.
        targets: names of layers.
        owner: who asks, for the error.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"{owner} needs peft: pip install 'regimen-rl[peft]'") from error
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    """Whether a model has adapters."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def adapters_disabled(model: Any, owner: str) -> Iterator[None]:
    """Within the context, a model computes with its base weights: a reference policy at no memory.

    Raises:
        ValueError: there are no adapters.
    """
    if not has_adapters(model):
        raise ValueError(f"{owner}.adapters_disabled: there are no adapters; add them with lora()")
    # Switching adapters makes peft set their requires_grad, so a frozen one would come back trainable.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
