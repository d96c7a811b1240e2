"""Dialogues: what a row holds, that it is scored as it was sampled, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from dialogues import GAME, Scripted, Talk, collect, talks, tiny
from tokenizers.decoders import ByteLevel
from torch import Tensor

from regimen import ReplayMemory
from regimen.policies.decoding import Completions
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks import DialogueTask, OneByOne, Reply
from tiny_models import byte_tokenizer

# What a row holds


def test_a_dialogue_is_one_row_of_turns() -> None:
    replies = [Reply("on on", reward=0.25), Reply("well", reward=-1.0)]
    policy = Scripted(lambda text: "yes no" if text == "go go" else "no")
    task = DialogueTask("talk", talks(*replies, opening="go go"), discount=0.5, evaluation=())
    rollout = collect(task, policy, 1)
    begin, go, on, well, yes, no, end = (
        policy.tokenizer.convert_tokens_to_ids(word) for word in ("<begin>", "go", "on", "well", "yes", "no", "<end>")
    )
    assert rollout.actions[0].tolist() == [begin, go, go, yes, no, end, on, on, no, end, well, no, end]
    own = [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1]
    assert rollout.loss_mask[0].int().tolist() == own
    assert rollout.mask.all()
    assert rollout.segment[0].tolist() == [0] * 6 + [1] * 4 + [2] * 3
    assert rollout.discount[0].tolist() == [1, 1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 0]
    assert rollout["env_reward"][0].tolist() == [0, 0, 0, 0, 0, 0.25, 0, 0, 0, -1, 0, 0, 1]
    assert rollout.logprobs[0].tolist() == [-step for step in own]
    assert list(rollout.context["prompt"]) == ["go go"]
    assert list(rollout["text"]) == ["go go\nyes no\non on\nno\nwell\nno\nend"]
    assert (int(rollout["turns"]), bool(rollout["success"]), bool(rollout["truncated"])) == (3, True, False)
    assert policy.asked == [["go go"], ["go go yes no on on"], ["go go yes no on on no well"]]


def test_token_level_discounts_of_two_turns_of_two_tokens() -> None:
    task = DialogueTask("talk", talks("on"), discount=0.95, evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 1)
    assert torch.allclose(rollout.discount[rollout.loss_mask], torch.tensor([1, 0.95, 1, 0]))


def test_turns_without_words_between_them_stay_apart() -> None:
    rollout = collect(DialogueTask("talk", talks("", ""), evaluation=()), Scripted(lambda text: "yes"), 1)
    assert rollout.segment[0, 2:].tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.loss_mask[0].tolist() == [False] * 2 + [True] * 6


def test_rows_of_different_lengths_are_padded_at_the_end() -> None:
    env = OneByOne(lambda start, random: Talk(["on"] * start))
    task = DialogueTask("talk", env, starts=[0, 2], order="sequential", evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 2)
    assert rollout.lengths.tolist() == [4, 10]
    assert not rollout.loss_mask[0, 4:].any()
    assert rollout["turns"].tolist() == [1, 3]
    assert rollout["env_reward"].nonzero().tolist() == [[0, 3], [1, 9]]


def test_what_was_sampled_is_kept_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of a tokenizer that would be read otherwise when written out: special tokens, and ends in mid-turn."""
    policy = tiny(max_new_tokens=3)
    sampled, complete = list[Completions](), policy.complete
    asked: list[list[Tensor]] = []

    def spy(starts: Sequence[Tensor], *rest: Any) -> Completions:
        asked.append(list(starts))
        sampled.append(complete(starts, *rest))
        return sampled[-1]

    monkeypatch.setattr(policy, "complete", spy)
    task = DialogueTask("talk", talks("higher", "lower", opening="guess from 1"), evaluation=())
    rollout = collect(task, policy, 6)
    for row in range(6):
        own = torch.cat([part.tokens[row][part.mask[row]] for part in sampled])
        assert torch.equal(rollout.actions[row][rollout.loss_mask[row]], own)
        for before in asked:
            assert torch.equal(before[row], rollout.actions[row, : len(before[row])])
    texts = policy.decode([rollout.actions[row][rollout.loss_mask[row]] for row in range(6)])
    again = [policy.encode_answer(text) for text in texts]
    assert any(len(a) != int(n) for a, n in zip(again, rollout.loss_mask.sum(1), strict=True))


def test_those_that_are_over_leave_the_batch() -> None:
    env = OneByOne(lambda start, random: Talk(["on"] * start))
    policy = Scripted(lambda text: "yes")
    task = DialogueTask("talk", env, starts=[0, 2, 1], order="sequential", evaluation=())
    collect(task, policy, 3)
    assert [len(rows) for rows in policy.asked] == [3, 2, 1]


def test_facts_become_columns_at_the_end_of_their_turns() -> None:
    replies = [Reply("on", facts={"valid": 1, "other": 3}), Reply("on")]
    task = DialogueTask("talk", talks(*replies), facts=("valid",), evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 1)
    assert rollout["valid"][0].tolist() == [0, 0, 0, 1] + [0] * 6
    assert rollout.get("other") is None


# Sampling and scoring agree


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_ratio_is_1_before_an_update(kind: str, knobs: dict[str, float]) -> None:
    openings = ["guess", "guess from 1 to 7", "guess from 1 to 7 from 1 to 7 from 1"]
    env = OneByOne(lambda start, random: Talk(["higher"] * (start % 3), openings[start % 3]))
    policy = tiny(kind, max_new_tokens=4)
    task = DialogueTask("talk", env, starts=[0, 1, 2], group_size=4, evaluation=())
    rollout = collect(task, policy, 12, **knobs)
    assert set(rollout["turns"].tolist()) == {1, 2, 3}
    assert float(rollout.logprobs[rollout.loss_mask].max()) < 0
    ratio = (policy.distribution(rollout).logprob - rollout.logprobs).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
    assert (rollout.get("kept") is not None) == bool(knobs.keys() & {"top_k", "top_p"})


def test_the_same_stream_gives_the_same_dialogues() -> None:
    task, policy = DialogueTask("guess", OneByOne(GAME), max_turns=3, group_size=2), tiny(max_new_tokens=2)
    first, again, other = (collect(task, policy, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.actions, again.actions)
    assert list(first["text"]) == list(again["text"])
    assert list(first["text"]) != list(other["text"])


def test_siblings_share_the_start_and_not_the_noise() -> None:
    noise: dict[int, list[float]] = {}

    def make(start: int, random: Random) -> Talk:
        noise.setdefault(start, []).append(random.random())
        return Talk([], "go" if start % 2 else "go on")

    task = DialogueTask("talk", OneByOne(make), group_size=3, evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 12)
    assert rollout.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert rollout["start_id"].view(4, 3).unique(dim=1).shape == (4, 1)
    assert len(noise) == 4
    assert all(len(set(drawn)) == 3 for drawn in noise.values())


# Chat

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + SPACE + m['content'] | trim }}"
    "{{ SPACE + '</s>' if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPACES = ["", " "]


def bytes_of(**options: Any) -> Any:
    """A tokenizer of bytes that decodes to what it encoded."""
    tokenizer = byte_tokenizer(**options)
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    return tokenizer


def chatting(space: str = "", **options: Any) -> TokenPolicy:
    """A policy whose chat template ends the assistant's messages only, after a space or at once."""
    return tiny(tokenizer=bytes_of(chat_template=CHAT.replace("SPACE", f"'{space}'")), chat=True, **options)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_glue_is_the_chat_template_around_a_turn(space: str, role: str) -> None:
    """Prompt, answer with its end, and reply are the template's rendering of the whole, but for spaces."""
    policy = chatting(space, system="be brief")
    end = torch.tensor([policy.tokenizer.eos_token_id])
    answer = torch.cat([policy.encode_answer("4"), end])
    row = torch.cat([policy.encode("pick"), answer, policy.encode_reply("no </s> more", answer, role)])
    messages = [("system", "be brief"), ("user", "pick"), ("assistant", "4"), (role, "no </s> more")]
    whole = policy.tokenizer.apply_chat_template(
        [{"role": speaker, "content": text} for speaker, text in messages], add_generation_prompt=True, tokenize=False
    )
    assert policy.tokenizer.decode(row).replace(" ", "") == whole.replace(" ", "")


def test_an_answer_that_was_cut_off_is_closed_by_the_template() -> None:
    policy = chatting()
    cut = policy.encode_answer("4")
    closed = torch.cat([cut, torch.tensor([policy.tokenizer.eos_token_id])])
    assert policy.tokenizer.decode(policy.encode_reply("no", cut)) == "</s>\n<user>no\n<assistant>"
    assert policy.tokenizer.decode(policy.encode_reply("no", closed)) == "\n<user>no\n<assistant>"


def test_dialogues_of_a_chat_are_scored_as_sampled() -> None:
    policy = chatting(max_new_tokens=4)
    rollout = collect(DialogueTask("talk", talks("more", opening="hi"), max_tokens=96, evaluation=()), policy, 4)
    assert rollout["turns"].tolist() == [2] * 4
    ratio = (policy.distribution(rollout).logprob - rollout.logprobs).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
    for row in range(4):
        heard = rollout.actions[row][rollout.mask[row] & ~rollout.loss_mask[row]]
        assert "<user>more\n<assistant>" in policy.tokenizer.decode(heard)


def test_a_template_that_hides_the_answer_is_refused() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    policy = tiny(tokenizer=bytes_of(chat_template=template), chat=True)
    with pytest.raises(ValueError, match="chat template hides or changes the assistant's message"):
        policy.encode_reply("no", torch.tensor([3]))


def test_a_stop_text_ends_a_turn_and_is_the_policys_own() -> None:
    """Sixteen letters of 258 tokens stop: in 40 tokens one comes with probability 0.92."""
    stops, tokenizer = "bcefghijklmnoqrt", bytes_of()
    policy = tiny(tokenizer=tokenizer, stop=list(stops), max_new_tokens=40)
    task = DialogueTask("talk", talks(" more ", opening="hi"), max_tokens=96, evaluation=())
    rollout = collect(task, policy, 8)
    stopped = 0
    for row in range(8):
        for turn in range(int(rollout["turns"][row])):
            own = rollout.actions[row][rollout.loss_mask[row] & (rollout.segment[row] == turn)]
            text = tokenizer.decode(own)
            stopped += text[-1] in stops
            assert not set(text[:-1]) & set(stops)
            assert text[-1] in stops or own[-1] == tokenizer.eos_token_id or len(own) == 40
    assert stopped > 8


# Ends


def test_too_many_turns_are_cut_off_and_not_ended() -> None:
    task = DialogueTask("talk", talks("on", "on", "on"), max_turns=2, discount=0.9, evaluation=())
    rollout = collect(task, Scripted(lambda text: "yes"), 1)
    assert bool(rollout["truncated"])
    assert int(rollout["turns"]) == 2
    assert float(rollout.discount[0, -1]) == pytest.approx(0.9)
    assert rollout.loss_mask[0, -1], "the reply that nobody answered is left out"
    assert rollout["text"][0].endswith("yes\non")


@pytest.mark.parametrize(("max_tokens", "turns"), [(6, 1), (9, 2), (12, 3), (100, 4)])
def test_a_dialogue_without_room_for_another_turn_is_cut_off(max_tokens: int, turns: int) -> None:
    """The prompt has 2 tokens, a turn 2 and a reply 1; a turn may take 4."""
    policy = Scripted(lambda text: "yes", max_new_tokens=4)
    task = DialogueTask("talk", talks("on", "on", "on"), max_tokens=max_tokens, evaluation=())
    rollout = collect(task, policy, 1)
    assert int(rollout["turns"]) == turns
    assert bool(rollout["truncated"]) == (turns < 4)
    assert rollout.steps <= max_tokens


def test_the_model_limits_the_length_by_itself() -> None:
    policy = tiny("gpt2", max_new_tokens=10)
    endless = OneByOne(lambda start, random: Talk(["higher " * 9] * 50))
    rollout = collect(DialogueTask("talk", endless, max_turns=50, evaluation=()), policy, 4)
    assert rollout["truncated"].all()
    assert int(rollout.lengths.min()) >= 96 - 19 - 10
    assert rollout.steps <= 96
    assert policy.distribution(rollout).logprob.isfinite().all()


def test_two_dialogue_tasks_share_a_batch_and_lengths_share_a_memory() -> None:
    short = DialogueTask("short", talks("well"), max_turns=2)
    long = DialogueTask("long", talks("well", "on", "on"), max_turns=4)
    policy = Scripted(lambda text: "yes")
    rollouts = [collect(task, policy, size=2) for task in (short, long)]
    both = Rollout.cat(rollouts)
    assert both["env_reward"].shape == both.mask.shape
    assert both["env_reward"].sum(1).tolist() == [1, 1, 1, 1]
    memory = ReplayMemory(8)
    for rollout in rollouts:
        memory.add(Rollout(rollout.data, ("any",)))
    assert memory.sample(4, torch.Generator().manual_seed(0))["env_reward"].shape[1] == both.steps
