"""Guided decoding: one candidate is plain sampling, more follow the judge, and answers end where they should."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.models import ProcessValue, small_decoder, word_tokenizer
from regimen.policies import GuidedDecoding, MultiHeadPolicy, TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks import PromptTask

WORDS = "a b c ; x y"
PROMPTS = ["x", "y x", "x x y"]


def policy(**settings: object) -> TokenPolicy:
    tokenizer = word_tokenizer(WORDS.split())
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=32)
    return TokenPolicy(model, tokenizer, **{"max_new_tokens": 6, "evaluation_temperature": 1.0, **settings})  # type: ignore[arg-type]


def count(word: str) -> object:
    def judge(rollout: Rollout) -> Tensor:
        return torch.tensor([float(text.split().count(word)) for text in rollout["text"].tolist()])

    return judge


def sample(sampler: object, times: int = 1, seed: int = 0, **knobs: float) -> Rollout:
    prompts = PROMPTS * times
    contexts = TensorDict({"prompt": NonTensorStack(*prompts)}, batch_size=[len(prompts)])
    return sampler.sample(contexts, Knobs.of(sampler, **knobs), torch.Generator().manual_seed(seed))  # type: ignore[attr-defined]


def test_one_candidate_is_plain_sampling() -> None:
    """In rounds of two tokens, answers are as likely as the policy says, cut-off and ended ones alike."""
    model = policy(max_new_tokens=3, top_k=3)
    guided = GuidedDecoding(model, count("a"), candidates=1, chunk=2)
    plain, ours = (sample(sampler, times=700, seed=3)["text"].tolist()[::3] for sampler in (model, guided))
    texts = {text for text in plain if plain.count(text) > 30}
    assert len(texts) > 3
    for text in texts:
        assert abs(plain.count(text) - ours.count(text)) < 4 * (2 * plain.count(text)) ** 0.5


def test_greedy_rounds_are_greedy_decoding() -> None:
    """What was committed is read as the text that it is: cut into rounds, the likeliest tokens are the same."""
    model = policy()
    whole = sample(model, temperature=0.0)
    for chunk in (1, 2, 5):
        rounds = sample(GuidedDecoding(model, count("a"), candidates=2, chunk=chunk), temperature=0.0)
        assert torch.equal(rounds.actions, whole.actions)
        assert torch.equal(rounds.mask, whole.mask)
        assert torch.equal(rounds.loss_mask, whole.loss_mask)
        assert rounds["truncated"].tolist() == whole["truncated"].tolist()


def test_more_candidates_please_the_judge_more() -> None:
    model = policy()
    means = [
        float(count("a")(sample(GuidedDecoding(model, count("a"), candidates=k, chunk=1), times=40)).mean())  # type: ignore[operator]
        for k in (1, 3, 8)
    ]
    assert means[0] + 0.3 < means[1] < means[2] - 0.3


def test_one_long_chunk_is_the_best_of_n() -> None:
    """The judge is shown whole answers, as many as there are candidates, and the best of them is given."""
    seen: list[list[str]] = []

    def judge(rollout: Rollout) -> Tensor:
        seen.append(rollout["text"].tolist())
        return count("b")(rollout)  # type: ignore[operator]

    found = sample(GuidedDecoding(policy(), judge, candidates=4, chunk=99))
    (texts,) = seen
    for row, text in enumerate(found["text"].tolist()):
        mine = texts[4 * row : 4 * row + 4]
        assert text == max(mine, key=lambda one: one.split().count("b"))


def test_rounds_end_at_a_boundary() -> None:
    """A chunk goes to the next `;` and the policy's own end ends the answer."""
    shown: list[str] = []

    def judge(rollout: Rollout) -> Tensor:
        shown.extend(rollout["text"].tolist())
        return torch.rand(len(rollout), generator=torch.Generator().manual_seed(len(shown)))

    guided = GuidedDecoding(policy(max_new_tokens=12), judge, candidates=2, until=[";"])
    found = sample(guided, times=10)
    assert any(text.count(";") == 1 and text.endswith(";") for text in shown)
    assert any(text.count(";") > 1 for text in shown)
    longest = found.loss_mask.sum(1)
    assert bool((longest <= 12).all())
    ended = ~found["truncated"]
    last = found.actions.gather(1, found.lengths[:, None] - 1).squeeze(1)
    assert bool((last[ended] == guided.policy.tokenizer.eos_token_id).all())
    assert bool((longest[~ended] == 12).all())


def test_no_more_rounds_than_allowed() -> None:
    found = sample(GuidedDecoding(policy(), count("a"), candidates=2, chunk=1, rounds=2), times=5)
    assert int(found.loss_mask.sum(1).max()) == 2
    assert found.logprobs is None


def test_heads_are_mixed_as_the_user_wants() -> None:
    tokenizer = word_tokenizer(WORDS.split())
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=32)
    many = MultiHeadPolicy(model, tokenizer, ["one", "two"], max_new_tokens=6)
    with torch.no_grad():
        for head, word in zip(many.output.heads, "ab", strict=True):
            head.weight[tokenizer.convert_tokens_to_ids(word)] *= 5
    guided = GuidedDecoding(many, count("c"), candidates=1)
    for weights in ({"head/one": 1.0, "head/two": 0.0}, {"head/one": 0.0, "head/two": 1.0}):
        knobs = {"temperature": 0.0, **weights}
        contexts = TensorDict({"prompt": NonTensorStack(*PROMPTS)}, batch_size=[3])
        rollouts = [
            sampler.sample(contexts, Knobs.of(sampler, **knobs), torch.Generator().manual_seed(0))
            for sampler in (guided, many)
        ]
        assert torch.equal(rollouts[0].actions, rollouts[1].actions)


def test_a_process_reward_model_may_be_the_judge_of_a_task() -> None:
    model = policy()
    process = ProcessValue(model.network)
    rows = TensorDict({"prompt": NonTensorStack(*PROMPTS)}, batch_size=[3])
    task = PromptTask("ask", rows, member="guided")
    cast = {"guided": GuidedDecoding(model, process.last, candidates=3, chunk=2)}
    rollout = task.collect(cast, Knobs.of(model), torch.Generator().manual_seed(0), 3)
    assert rollout.task_names == ("ask",)
    assert len(rollout) == 3


def test_it_passes_the_checker_of_policies() -> None:
    guided = GuidedDecoding(policy(), count("a"), candidates=2, chunk=2)
    rollout = sample(guided)
    assert check(guided, rollout).messages == []
    with pytest.raises(NotImplementedError, match="score them with the policy itself"):
        guided.distribution(rollout)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates=0, chunk=256, rounds=20; expected at least 1"):
        GuidedDecoding(policy(), count("a"), candidates=0)
