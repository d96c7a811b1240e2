"""Policies that are shown images, on tiny models of the Qwen2-VL family that went through a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

import tiny_language_models as tiny
from regimen.cast import Cast
from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.objectives import SFTObjective
from regimen.policies import QwenVLImages, TokenPolicy
from regimen.policies.vision import expand_placeholders
from regimen.regimen import Regimen, Stage
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask
from regimen.update import Update

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
PROMPTS = ["the cat", "a", "say yes or no. the hat", "a", "the cat"]
# Images of 16 x 24 pixels are 4 x 6 patches, of which 2 x 2 are a token.
TOKENS = 6


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(kind)`: a model with its tokenizer and image processor on disk."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            parts = (tiny.vision_model(kind), tiny.tokenizer(), tiny.image_processor())
            made[kind] = tiny.save(tmp_path_factory.mktemp(kind), *parts)
        return made[kind]

    return of


def load(path: Path, **settings: Any) -> TokenPolicy:
    return TokenPolicy.from_pretrained(
        path, **{"processor": QwenVLImages.from_pretrained(path), "max_new_tokens": 8, "stop": ["e", "a"], **settings}
    )


@pytest.fixture(params=[(kind, chat) for kind in KINDS for chat in (False, True)], ids=str)
def policy(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> TokenPolicy:
    kind, chat = request.param
    return load(folder(kind), chat=chat)


def images(count: int = 5, seed: int = 0) -> Tensor:
    """The last is the first."""
    drawn = torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))
    return torch.cat([drawn[:-1], drawn[:1]])


def ask(prompts: Sequence[str] = PROMPTS, shown: Tensor | None = None) -> TensorDict:
    shown = images(len(prompts)) if shown is None else shown
    return TensorDict({"prompt": NonTensorStack(*prompts), "image": shown}, batch_size=[len(prompts)])


def sample(policy: TokenPolicy, contexts: TensorDict | None = None, seed: int = 0, **knobs: float) -> Rollout:
    contexts = ask() if contexts is None else contexts
    return policy.sample(contexts, Knobs.of(policy, **knobs), torch.Generator().manual_seed(seed))


def of_the_model(policy: TokenPolicy, tokens: Tensor, image: Tensor) -> dict[str, Tensor]:
    """What `transformers` itself wants to read for one sequence."""
    assert policy.processor is not None
    made = policy.processor(TensorDict({"image": image[None]}, batch_size=[1]))
    kinds = (tokens == policy.network.base.config.image_token_id).int()
    found = {name: value.flatten(0, 1) for name, value in made.items()}
    return {"input_ids": tokens[None], "mm_token_type_ids": kinds[None], **found}


# Prompts


def test_a_prompt_has_as_many_placeholders_as_the_image_has_tokens(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    placeholder = policy.network.base.config.image_token_id
    assert (rollout.actions == placeholder).sum(1).tolist() == [TOKENS] * 5
    large = sample(policy, ask(["a"], torch.rand(1, 3, 32, 40)))
    assert int((large.actions == placeholder).sum()) == 4 * 5


def test_the_image_stands_between_its_marks_in_front_of_the_prompt(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"))
    shown = policy.tokenizer.decode(sample(policy).actions[1][:10])
    assert shown.startswith("<|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|>a")


def test_a_chat_prompt_is_that_of_the_template_for_images(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"), chat=True)
    content = [{"type": "image"}, {"type": "text", "text": "the cat"}]
    messages = [{"role": "user", "content": content}]
    text = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * TOKENS)
    expected = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample(policy).actions[0][: len(expected)].tolist() == expected


def test_a_prompt_may_say_where_its_image_goes(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    rollout = sample(policy, ask([f"the cat {mark} sat"], images(2)[:1]))
    text = policy.tokenizer.decode(rollout.actions[0])
    assert text.startswith("the cat <|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|> sat")


def test_placeholders_that_do_not_fit_the_images_are_refused(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"))
    with pytest.raises(ValueError, match="2 image placeholders .token 5., expected 1, one per image"):
        sample(policy, ask(["<|image_pad|><|image_pad|>"], images(2)[:1]))


def test_placeholders_are_repeated_image_by_image() -> None:
    ids = torch.tensor([1, 7, 2, 7, 3])
    assert expand_placeholders(ids, 7, torch.tensor([2, 3])).tolist() == [1, 7, 7, 2, 7, 7, 7, 3]


@pytest.mark.parametrize("entries", [{}, {"image": torch.zeros(1, 1, 8, 8)}, {"image": torch.zeros(1, 8)}])
def test_contexts_without_images_are_refused(folder: Callable[[str], Path], entries: dict[str, Tensor]) -> None:
    policy = load(folder("qwen2_vl"))
    contexts = TensorDict({"prompt": NonTensorStack("a"), **entries}, batch_size=[1])
    with pytest.raises(ValueError, match=r"contexts need 'image' of shape \[B, 3, H, W\] in \[0, 1\], found"):
        sample(policy, contexts)


# Positions


def test_positions_count_an_image_in_time_height_and_width(folder: Callable[[str], Path]) -> None:
    """A token, an image of 2 x 3 tokens, two tokens: the image is as long as its longer side."""
    network = load(folder("qwen2_vl")).network
    image = network.base.config.image_token_id
    ids = torch.tensor([[0, 0, 9, *[image] * 6, 8, 8]])
    grid = {"image_grid_thw": torch.tensor([[[1, 4, 6]]])}
    found = network.positions(ids != 0, ids, grid)[:, 0, 2:]
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("setting", [{}, {"temperature": 1.5, "top_k": 9}])
def test_sampling_and_scoring_agree_with_the_model_itself(policy: TokenPolicy, setting: dict[str, float]) -> None:
    """In sampling the image is read once and left behind in the cache; the prompts have different lengths."""
    rollout = sample(policy, **setting)
    scored = policy.logprob(rollout).detach()
    torch.testing.assert_close(scored, rollout.logprobs, rtol=0, atol=1e-5)
    if setting:
        return
    for row in range(len(rollout)):
        length, own = int(rollout.lengths[row]), rollout.loss_mask[row]
        tokens = rollout.actions[row, :length]
        with torch.no_grad():
            logits = policy.network.base(**of_the_model(policy, tokens, rollout.context["image"][row])).logits[0]
        # The model may say what a policy never says.
        logits[:, policy.network.placeholders] = -torch.inf
        expected = logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
        place = own[1:length]
        torch.testing.assert_close(scored[row, 1:length][place], expected[place], rtol=0, atol=1e-5)


def test_greedy_answers_are_those_of_generate(policy: TokenPolicy) -> None:
    rollout = sample(policy, temperature=0.0)
    config = policy.network.base.config
    for row, start in enumerate((~rollout.loss_mask & rollout.mask).sum(1).tolist()):
        theirs = policy.network.base.generate(
            **of_the_model(policy, rollout.actions[row, :start], rollout.context["image"][row]),
            attention_mask=torch.ones(1, start), do_sample=False, max_new_tokens=8, tokenizer=policy.tokenizer,
            stop_strings=policy.stop.texts, suppress_tokens=[config.image_token_id, config.video_token_id],
        )[0]  # fmt: skip
        assert rollout.actions[row, : int(rollout.lengths[row])].tolist() == theirs.tolist()


def test_one_row_alone_is_scored_as_in_its_batch(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    whole = policy.logprob(rollout)
    alone = torch.cat([policy.logprob(rollout[row]) for row in range(len(rollout))])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_a_sample_leaves_no_positions_behind_in_the_model(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    before = policy.logprob(rollout)
    sample(policy, ask(["the dog ate", "no"], torch.rand(2, 3, 24, 8)))
    assert torch.equal(policy.logprob(rollout), before)
    assert policy.network.base.base_model.rope_deltas is None


def test_parts_that_do_not_see_each_other_keep_the_images_positions(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"))
    rollout = sample(policy)
    everything = torch.ones(5, rollout.steps, rollout.steps, dtype=torch.bool)
    found = policy.logprob(rollout.with_step_columns(visible=everything)).detach()
    torch.testing.assert_close(found, rollout.logprobs, rtol=0, atol=1e-5)


# What is seen


def test_equal_prompts_with_equal_images_are_read_once(policy: TokenPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    hidden = policy.network.hidden
    monkeypatch.setattr(policy.network, "hidden", lambda ids, **o: shapes.append(ids.shape) or hidden(ids, **o))
    sample(policy)
    # Prompts 1 and 3 have the same text and different images, prompts 0 and 4 the same of both.
    assert shapes[0][0] == 4
    assert all(length == 1 for _, length in shapes[1:])


def test_the_answer_depends_on_the_image(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    other = rollout.replace(context=ask(shown=images(seed=1)))
    assert (policy.logprob(other) - policy.logprob(rollout))[rollout.loss_mask].abs().max() > 1e-3


def test_a_policy_never_says_a_placeholder(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"), stop=())
    rollout = sample(policy, ask(["a"] * 60, images(60)), temperature=3.0, max_new_tokens=20)
    config = policy.network.base.config
    own = rollout.actions[rollout.loss_mask]
    assert len(own) > 1000
    assert not torch.isin(own, torch.tensor([config.image_token_id, config.video_token_id])).any()


def test_without_a_processor_the_model_reads_text(folder: Callable[[str], Path]) -> None:
    policy = load(folder("qwen2_vl"), processor=None)
    rollout = sample(policy)
    torch.testing.assert_close(policy.logprob(rollout).detach(), rollout.logprobs, rtol=0, atol=1e-5)


def test_a_policy_with_images_passes_the_checker(policy: TokenPolicy) -> None:
    result = check(policy, rollout=sample(policy))
    assert result.ok, str(result)


def test_a_saved_policy_is_loaded_with_its_image_processor(policy: TokenPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    again = load(tmp_path, chat=policy.chat)
    assert torch.equal(sample(again).actions, sample(policy).actions)


# Learning


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_supervised_learning_names_what_is_in_the_picture(folder: Callable[[str], Path], lora_rank: int | None) -> None:
    if lora_rank:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = load(folder("qwen2_vl"), lora_rank=lora_rank, stop=())
    shown = torch.zeros(4, 3, 8, 8)
    for colour in range(3):
        shown[colour, colour] = 1
    answers = ["red", "yes", "blue", "no"]
    contexts = ask(["say"] * 4, shown)
    rows = policy.demonstrations(["say"] * 4, answers, context=contexts)
    update = Update(SFTObjective(), learning_rate=1e-2)
    stage = Stage(name="sft", tasks=[DatasetTask("pictures", rows)], updates=[update], steps=40, batch_size=4)
    train(Regimen(cast=Cast(policy=policy), stages=[stage]), seed=0)
    assert list(sample(policy, contexts, temperature=0.0)["text"]) == answers
