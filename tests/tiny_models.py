"""Tiny, randomly initialised models of the real classes of diffusers and transformers, to be saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

CHAT = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)
CLASSES = ("cat", "dog", "bench")


def letters() -> dict[str, int]:
    return {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}


def byte_tokenizer(**options: Any) -> Any:
    """A byte is a token."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=letters(), merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **options)


def clip_text(width: int, projection: int) -> tuple[Any, Any]:
    """Tokenizer and text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = letters()
    words |= {f"{letter}</w>": len(words) + number for letter, number in words.items()}
    words |= {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, projection_dim=projection, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=77), CLIPTextModelWithProjection(config).eval()


def t5_text(width: int) -> tuple[Any, Any]:
    """Tokenizer and text encoder."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(vocab_size=len(pieces) + 100, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5TokenizerFast(vocab=pieces), T5EncoderModel(config).eval()


def autoencoder(factor: int) -> Any:
    """An `AutoencoderKL` of 4 latent channels, each latent of `factor` x `factor` pixels."""
    import diffusers

    blocks = factor.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, norm_num_groups=2, latent_channels=4, layers_per_block=1,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def flux_fill_pipeline(factor: int = 4) -> Any:
    """A `FluxFillPipeline`."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=2 * 4 * 4 + 4 * factor**2, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip
    tokenizer, with_projection = clip_text(8, 4)
    tokenizer_2, text_encoder_2 = t5_text(24)
    return diffusers.FluxFillPipeline(
        transformer=transformer.eval(), vae=autoencoder(factor), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(CLIPTextConfig(**with_projection.config.to_dict())).eval(),
        text_encoder_2=text_encoder_2,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
    )  # fmt: skip


def sd3_pipeline(encoders: bool = True, factor: int = 4, shift: float = 3.0) -> Any:
    """A `StableDiffusion3Pipeline`; without `encoders` it has no text encoder. `factor` is the autoencoder's."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=12,
    )  # fmt: skip
    vae = autoencoder(factor)
    texts = [(None, None)] * 3 if not encoders else [clip_text(8, 4), clip_text(12, 6), t5_text(24)]
    (tokenizer, text_encoder), (tokenizer_2, text_encoder_2), (tokenizer_3, text_encoder_3) = texts
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        tokenizer=tokenizer, text_encoder=text_encoder, tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2,
        tokenizer_3=tokenizer_3, text_encoder_3=text_encoder_3,
    )  # fmt: skip


def yolos(size: int = 32, patch: int = 8, spread: float = 0.02, seed: int = 0) -> nn.Module:
    """A detector of `CLASSES`; weights of deviation `spread` and more make it see different things in images."""
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(seed)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[size, size],
        patch_size=patch, num_detection_tokens=7, num_labels=len(CLASSES),
    )  # fmt: skip
    config.id2label = dict(enumerate(CLASSES))
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=spread)
    return model


def llava() -> tuple[nn.Module, Any]:
    """A vision-language model with its processor."""
    import transformers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(additional_special_tokens=["<image>"])
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(
        **small, vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=0, eos_token_id=1
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    processor = transformers.LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval(), processor


def qwen(tokenizer: Any) -> nn.Module:
    """A Qwen2.5-VL whose images are the token `<image>`, with patches of 4 x 4 merged by 2 x 2."""
    import transformers

    torch.manual_seed(0)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=image + 1000,
        vision_start_token_id=image + 1001, vision_end_token_id=image + 1002,
    )  # fmt: skip
    model: nn.Module = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


def qwen_judge() -> tuple[nn.Module, Any]:
    """A Qwen2.5-VL with a processor that needs no video, and so no torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(additional_special_tokens=["<image>", "Yes", "No"])
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
    )
    # Something stands between two images, as in Qwen's own chats.
    chat = CHAT.replace("<image>", "[<image>]")
    return qwen(tokenizer), transformers.LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=chat)


def save(folder: Path, *parts: Any) -> str:
    """Write parts to one folder; returns its name."""
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)
