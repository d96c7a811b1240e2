"""Truncation, sampling and scoring of categorical distributions; row streams."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from regimen.functions import row_uniform, sample_tokens, support_size, token_logprob
from regimen.functions.categorical import draw_tokens

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [
    (0, 1.0, 4), (3, 1.0, 3), (9, 1.0, 4), (0, 0.3, 1), (0, 0.39, 1), (0, 0.41, 2), (0, 0.95, 4), (0, 1e-6, 1),
    # Of the two likeliest, the first has 4/7 of their probability.
    (2, 0.5, 1), (2, 0.6, 2), (1, 0.99, 1),
])  # fmt: skip
def test_support_size_in_worked_numbers(top_k: int, top_p: float, kept: int) -> None:
    assert support_size(LOGITS, top_k, top_p).tolist() == [kept]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.9), (5, 1.0), (5, 0.7), (20, 0.5)])
def test_support_size_is_that_of_transformers(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    left = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    left = TopPLogitsWarper(top_p)(None, left)
    assert torch.equal(support_size(logits, top_k, top_p), left.isfinite().sum(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (0, 0.0), (0, 1.1)])
def test_truncation_out_of_range_is_refused(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match="expected top_k >= 0 and top_p in"):
        support_size(LOGITS, top_k, top_p)


def test_logprob_in_worked_numbers() -> None:
    logits = LOGITS.expand(3, -1)
    tokens = torch.tensor([1, 3, 0])
    assert token_logprob(logits, tokens).exp().tolist() == pytest.approx([0.4, 0.3, 0.1])
    kept = torch.tensor([2, 3, 1])
    # The third token is outside its support of one, and takes its place.
    assert token_logprob(logits, tokens, kept).exp().tolist() == pytest.approx([4 / 7, 3 / 9, 1.0])


def test_truncated_probabilities_add_up_to_one_over_the_support() -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    support = logits[0].topk(5).indices
    kept = torch.tensor([5])
    total = sum(float(token_logprob(logits, token[None], kept).exp()) for token in support)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_a_token_that_falls_out_of_the_support_does_so_without_a_jump() -> None:
    def at(logit: float) -> float:
        logits = torch.tensor([[2.0, 1.0, logit]], dtype=torch.float64)
        return float(token_logprob(logits, torch.tensor([2]), torch.tensor([2])))

    assert at(1.0 - 1e-9) == pytest.approx(at(1.0 + 1e-9), abs=1e-8)
    assert at(0.5) == pytest.approx(0.5 - math.log(math.exp(2) + math.exp(0.5)))


def test_support_of_the_whole_vocabulary_is_no_truncation() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(6)
    torch.testing.assert_close(token_logprob(logits, tokens, torch.full((6,), 9)), token_logprob(logits, tokens))


def test_sampling_inverts_the_distribution_function() -> None:
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999], dtype=torch.float64)
    assert sample_tokens(LOGITS.expand(8, -1), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # The two likeliest in order: token 1 up to 4/7, then token 3.
    kept = torch.full((8,), 2)
    assert sample_tokens(LOGITS.expand(8, -1), uniform, kept).tolist() == [1, 1, 1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    logits = 3 * torch.randn(2000, 12, generator=torch.Generator().manual_seed(4))
    logits[:, :3], logits[:, 9:] = -torch.inf, -1e9
    tokens = sample_tokens(logits, torch.full((2000,), uniform, dtype=torch.float64))
    assert tokens.unique().tolist() == [3 if uniform == 0 else 8]


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 1000, 4096])
def test_drawing_by_blocks_inverts_the_same_distribution_function(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(300, vocabulary, generator=generator)
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    tokens, logprobs = draw_tokens(logits, uniform)
    reached = cumulative.gather(-1, tokens[:, None])[:, 0]
    before = reached - logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (uniform > before - 1e-6).all()
    assert (uniform < reached + 1e-6).all()
    torch.testing.assert_close(logprobs, token_logprob(logits, tokens), rtol=0, atol=2e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn_from_blocks(uniform: float) -> None:
    logits = torch.full((2, 1000), -1e9)
    logits[0, 999], logits[1, 500] = 0.0, -3.0
    drawn = draw_tokens(logits, torch.full((2,), uniform, dtype=torch.float64))
    assert drawn[0].tolist() == [999, 500]
    assert drawn[1].tolist() == [0.0, 0.0]


def test_a_rows_token_does_not_depend_on_other_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, uniform = torch.randn(20, 12, generator=generator), torch.rand(20, generator=generator)
    kept = torch.randint(1, 12, (20,), generator=generator)
    whole = sample_tokens(logits, uniform, kept)
    alone = [int(sample_tokens(logits[i : i + 1], uniform[i : i + 1], kept[i : i + 1])) for i in range(20)]
    assert whole.tolist() == alone


def test_row_streams_are_splitmix64() -> None:
    """Published outputs for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    seeds = torch.tensor([1234567])
    found = [float(row_uniform(seeds, step)) for step in range(4)]
    assert found == [(value >> 11) * 2.0**-53 for value in published]


def test_row_streams_are_uniform_and_do_not_follow_each_other() -> None:
    seeds = torch.arange(4000)
    drawn = torch.stack([row_uniform(seeds, step) for step in range(4)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean(1).sub(0.5).abs().max() < 0.02
    shares = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    assert (shares - 0.05).abs().max() < 0.005
    neighbours = torch.corrcoef(torch.cat([drawn, drawn.roll(1, 1)]))
    assert (neighbours - torch.eye(8)).abs().max() < 0.06
