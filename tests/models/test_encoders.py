"""Language models of `transformers`, tiny and randomly initialised, behind the conditioner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from regimen.models import MetaQueryConditioner, MetaQueryConnector, TransformersEncoder
from regimen.models.encoders import merged_patches

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
IMAGE, START, END = 30, 31, 32


def qwen2() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def qwen_vl() -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=33,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def conditioner(model: torch.nn.Module) -> MetaQueryConditioner:
    torch.manual_seed(1)
    connector = MetaQueryConnector(3, 16, 24, layers=1, heads=2, mlp=32, prompt_dim=12, pooled_dim=10)
    return MetaQueryConditioner(TransformersEncoder(model), connector)


@pytest.fixture
def context() -> dict[str, Tensor]:
    torch.manual_seed(2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return {"prompt_ids": torch.randint(4, 30, (3, 5)), "prompt_mask": mask}


@pytest.mark.parametrize("build", [qwen2, qwen_vl, llava])
def test_text_runs_as_the_model_itself_would_run_it(build, context):
    model = build().eval()
    encoder = TransformersEncoder(model)
    ids = context["prompt_ids"]
    embeds, mask, positions = encoder.embed(ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder.run(embeds, mask, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [qwen2, qwen_vl])
def test_padding_side_does_not_matter(build, context):
    module = conditioner(build())
    left = {key: value.clone() for key, value in context.items()}
    for value in left.values():
        value[1] = value[1].roll(2)
    right_out, left_out = module(context), module(left)
    for key in ("prompt_embeds", "pooled"):
        torch.testing.assert_close(left_out[key], right_out[key], atol=1e-5, rtol=0)
    short = module({key: value[1:2, :3] for key, value in context.items()})
    torch.testing.assert_close(short["pooled"], right_out["pooled"][1:2], atol=1e-5, rtol=0)


def test_queries_learn_through_a_frozen_model(context):
    module = conditioner(qwen2()).train()
    module(context)["pooled"].square().sum().backward()
    assert module.connector.queries.grad.abs().sum(1).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in module.encoder.parameters())
    assert not module.encoder.model.training


@pytest.mark.parametrize("build", [qwen2, qwen_vl])
def test_saved_and_loaded_models_answer_alike(build, context, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    given = dict(context)
    if build is qwen_vl:
        given["prompt_image"] = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(conditioner(loaded)(given)["pooled"], conditioner(model)(given)["pooled"])


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_an_image_runs_as_the_model_itself_would_run_it(size):
    """Qwen2.5-VL on ids that hold the image's tokens: embeddings, 3-D positions and hidden states agree."""
    model = qwen_vl().eval()
    encoder = TransformersEncoder(model, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    image, count = torch.rand(2, 3, *size), size[0] * size[1] // 64
    text = torch.tensor([[5, 6], [7, 8]])
    front = torch.tensor([START, *[IMAGE] * count, END]).expand(2, -1)
    ids = torch.cat([front, text], dim=1)
    grid = torch.tensor([[1, size[0] // 4, size[1] // 4]] * 2)
    with torch.no_grad():
        expected = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=merged_patches(image, 4, 2, 2),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == IMAGE).int(),
            output_hidden_states=True,
        ).hidden_states[-1]
        for prompt in (ids, text):
            found = encoder.run(*encoder.embed(prompt, torch.ones_like(prompt, dtype=torch.bool), image))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_image_patches_are_those_of_the_models_own_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 24), dtype=np.uint8)
    expected = processor(pixels, return_tensors="pt", input_data_format="channels_first")
    encoder = TransformersEncoder(qwen_vl())
    image = torch.from_numpy(pixels).float().unsqueeze(0) / 255
    found = merged_patches(encoder._normalised(image, 16, 24), 4, 2, 2)
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]]
    torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [qwen_vl, llava])
def test_rows_with_and_without_an_image_mix(build, context):
    module = conditioner(build())
    image, has = torch.rand(3, 1, 8, 8), torch.tensor([True, False, True])
    plain, seen = module(context), module({**context, "prompt_image": image})
    mixed = module({**context, "prompt_image": image, "has_prompt_image": has})
    torch.testing.assert_close(mixed["pooled"][has], seen["pooled"][has], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed["pooled"][~has], plain["pooled"][~has], atol=1e-5, rtol=0)
    other = module({**context, "prompt_image": 1 - image})
    assert (other["pooled"] - seen["pooled"]).abs().amax(1).min() > 1e-5


def test_images_are_resized_to_whole_merged_patches(context):
    encoder = TransformersEncoder(qwen_vl())
    features, grid = encoder._image_features(torch.rand(2, 3, 15, 26))
    assert grid.tolist() == [[1, 4, 6]] * 2
    assert features.shape == (2, 6, 16)


def test_null_token_is_the_models_own():
    assert TransformersEncoder(qwen2()).null_token == 1
    assert TransformersEncoder(qwen2(), null_token=9).null_token == 9


def test_errors_name_what_is_wrong(context):
    ids, mask = context["prompt_ids"], context["prompt_mask"]
    with pytest.raises(ValueError, match="Qwen2Model has no vision tower"):
        TransformersEncoder(qwen2()).embed(ids, mask, torch.rand(3, 3, 8, 8))
    ids = ids.clone()
    ids[:, 0] = IMAGE
    with pytest.raises(ValueError, match=r"\[1, 1, 1\] image tokens \(30\).*makes 4"):
        TransformersEncoder(qwen_vl()).embed(ids, mask, torch.rand(3, 3, 16, 16))
