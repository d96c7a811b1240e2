"""Tiny, randomly initialised language models of the real classes, saved with their tokenizer as a hub has them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

TEXTS = [
    "the cat sat on the mat. the dog ate the hat.",
    "a red square and a blue disc. say yes or no.",
    "<answer> 42 </answer>",
]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLASSES = ["llama", "qwen2", "qwen3", "gpt2"]


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with some merges and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=letters)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT,
        additional_special_tokens=SPECIAL,
    )  # fmt: skip


def language_model(kind: str, **options: Any) -> Any:
    """A model of one of `CLASSES` (or another that takes the same settings) whose distributions are not flat."""
    import transformers

    names = {
        "llama": ("LlamaForCausalLM", "LlamaConfig"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"), "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config"), "mistral": ("MistralForCausalLM", "MistralConfig"),
        "granite": ("GraniteForCausalLM", "GraniteConfig"), "cohere": ("CohereForCausalLM", "CohereConfig"),
        "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig"),
    }  # fmt: skip
    model, config = (getattr(transformers, name) for name in names[kind])
    words = tokenizer()
    size = {"n_embd": 16, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {**SMALL, "head_dim": 8}
    settings = {"max_position_embeddings": 64, "initializer_range": 0.3, **size, **options}
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=len(words), bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
            **settings,
        )
    ).eval()  # fmt: skip


def save(folder: Path, *parts: Any) -> Path:
    """Write parts to one folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def vision_model(kind: str = "qwen2_vl", **options: Any) -> Any:
    """A vision-language model of the Qwen family (`qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`): patches of 4, merged 2 x 2."""
    import transformers

    words = tokenizer()
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    text = {
        **SMALL, "head_dim": 8, "hidden_size": 32, "vocab_size": len(words), "max_position_embeddings": 128,
        "rope_parameters": rope, "bos_token_id": None, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id, "initializer_range": 0.3, **options,
    }  # fmt: skip
    common = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
    vision: dict[str, Any] = {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
                       "fullatt_block_indexes": [1]},
        "qwen3_vl": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16,
                     "deepstack_visual_indexes": [0]},
    }  # fmt: skip
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(transformers, f"{names[kind]}Config")
    model = getattr(transformers, f"{names[kind]}ForConditionalGeneration")
    torch.manual_seed(0)
    return model(config(text_config=text, vision_config=common | vision[kind], **ids)).eval()


def image_processor() -> Any:
    """Of `vision_model`, for images of 8 x 8 pixels and more."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096)
