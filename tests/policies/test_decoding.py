"""The sampler: a row's sample depends on its own prompt and seed alone, and follows the model's distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import tiny_language_models as tiny
from regimen.models import CausalLM
from regimen.policies import decoding
from regimen.policies.decoding import Completions, Sampling, decode
from regimen.policies.stopping import StopAt

SETTINGS = {
    "plain": Sampling(),
    "cold": Sampling(0.7),
    "hot": Sampling(2.0),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.8),
    "both": Sampling(1.3, 7, 0.9),
    "greedy": Sampling(0.0),
}
STARTS = [torch.tensor(ids) for ids in ([5], [40, 8, 100, 7, 31, 2], [9, 60, 12])]


@pytest.fixture(scope="module")
def networks() -> dict[str, CausalLM]:
    # Mistral and Gemma 2 have layers that look back over a window; Gemma 2 has other layers too, and a cap on logits.
    windows = {"mistral": {"sliding_window": 5}, "gemma2": {"sliding_window": 5, "attn_implementation": "eager"}}
    kinds = [*tiny.CLASSES, *windows]
    return {kind: CausalLM(tiny.language_model(kind, **windows.get(kind, {}))) for kind in kinds}


@pytest.fixture(params=[*tiny.CLASSES, "mistral", "gemma2"])
def network(request: pytest.FixtureRequest, networks: dict[str, CausalLM]) -> CausalLM:
    return networks[request.param]


def stop() -> StopAt:
    return StopAt(tiny.tokenizer(), ["e", "a", "t"])


def run(
    network: CausalLM, rows: Sequence[int], seeds: Sequence[int], sampling: Sampling, starts: Sequence[Tensor] = STARTS
) -> Completions:
    sampling = replace(sampling, max_new_tokens=12)
    return decode(network, starts, torch.tensor(rows), sampling, stop(), torch.tensor(seeds))


def rows_of(found: Completions, index: Sequence[int]) -> Completions:
    """Some rows, cut to their longest."""
    rows = torch.tensor(index)
    length = int(found.mask[rows].sum(1).max())
    kept = None if found.kept is None else found.kept[rows, :length]
    return Completions(
        found.tokens[rows, :length], found.mask[rows, :length], found.logprobs[rows, :length], kept, found.ended[rows]
    )


def same(a: Completions, b: Completions) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.ended, b.ended)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
    if a.kept is not None:
        assert b.kept is not None
        assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize("setting", SETTINGS)
def test_prompts_of_different_lengths_in_one_batch_are_answered_as_alone(network: CausalLM, setting: str) -> None:
    sampling = SETTINGS[setting]
    rows, seeds = [0, 1, 2, 1, 0, 2], [11, 12, 13, 14, 15, 16]
    together = run(network, rows, seeds, sampling)
    for place, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        alone = run(network, [0], [seed], sampling, [STARTS[row]])
        same(rows_of(together, [place]), alone)


@pytest.mark.parametrize("setting", ["plain", "both"])
def test_a_permuted_or_smaller_batch_has_the_same_samples(network: CausalLM, setting: str) -> None:
    rows, seeds = [0, 1, 2, 1, 0, 2], [11, 12, 13, 14, 15, 16]
    whole = run(network, rows, seeds, SETTINGS[setting])
    for index in ([5, 3, 0, 2, 4, 1], [4, 1]):
        part = run(network, [rows[i] for i in index], [seeds[i] for i in index], SETTINGS[setting])
        same(part, rows_of(whole, index))


@pytest.mark.parametrize("setting", ["plain", "both"])
def test_dropping_finished_rows_changes_nothing(
    network: CausalLM, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for share in (0.0, decoding.DROP_BELOW, 1.1):
        monkeypatch.setattr(decoding, "DROP_BELOW", share)
        found.append(run(network, [0, 1, 2] * 4, range(12), SETTINGS[setting]))
    assert found[0].mask.sum(1).unique().numel() > 3
    same(found[0], found[1])
    same(found[0], found[2])


def spied(network: CausalLM, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[int]]:
    """The shapes of prompts that the network reads from now on, and of how many rows it gives logits."""
    shapes: list[tuple[int, int]] = []
    rows: list[int] = []
    hidden: Callable[..., Tensor] = network.hidden
    logits: Callable[..., Tensor] = network.logits

    def reading(ids: Tensor, **options: Any) -> Tensor:
        if ids.shape[1] > 1:
            shapes.append((ids.shape[0], ids.shape[1]))
        return hidden(ids, **options)

    def noting(states: Tensor) -> Tensor:
        rows.append(len(states))
        return logits(states)

    monkeypatch.setattr(network, "hidden", reading)
    monkeypatch.setattr(network, "logits", noting)
    return shapes, rows


def test_a_groups_prompt_is_read_once_and_finished_rows_no_more(
    network: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, rows = spied(network, monkeypatch)
    found = run(network, [0] * 8 + [1] * 8, range(16), Sampling(), STARTS[:2])
    assert shapes == [(2, 6)]
    assert rows[0] == 2
    read = rows[1:]
    assert len(read) == found.tokens.shape[1] - 1
    assert read[0] <= 16
    assert read == sorted(read, reverse=True)
    for step, rows in enumerate(read, 1):
        at_work = int((found.mask.sum(1) > step).sum())
        assert at_work <= rows <= at_work / decoding.DROP_BELOW


def test_a_batch_that_ends_at_once_is_read_once(networks: dict[str, CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, rows = spied(networks["llama"], monkeypatch)
    found = decode(
        networks["llama"], STARTS, torch.arange(3), Sampling(max_new_tokens=9),
        lambda tokens, length: torch.ones(len(tokens), dtype=torch.bool), torch.arange(3),
    )  # fmt: skip
    assert len(shapes) == len(rows) == 1
    assert found.tokens.shape == (3, 1)
    assert found.ended.tolist() == [True] * 3


def test_rows_that_never_end_are_cut_at_the_limit(networks: dict[str, CausalLM]) -> None:
    found = decode(
        networks["llama"], STARTS, torch.tensor([2, 0]), Sampling(max_new_tokens=4),
        lambda tokens, length: torch.zeros(len(tokens), dtype=torch.bool), torch.arange(2),
    )  # fmt: skip
    assert found.mask.tolist() == [[True] * 4] * 2
    assert found.ended.tolist() == [False, False]


def test_greedy_takes_the_likeliest_token_and_has_no_logprobs(network: CausalLM) -> None:
    found = run(network, [1], [0], Sampling(0.0))
    tokens = torch.cat([STARTS[1], found.tokens[0]])
    with torch.no_grad():
        expected = network.base(tokens[None]).logits[0, len(STARTS[1]) - 1 : -1].argmax(-1)
    assert torch.equal(found.tokens[0], expected)
    assert found.logprobs.abs().max() == 0


@pytest.mark.parametrize("setting", ["plain", "cold", "hot", "top-k", "top-p", "both"])
def test_sampled_frequencies_follow_the_distribution(networks: dict[str, CausalLM], setting: str) -> None:
    sampling, count = replace(SETTINGS[setting], max_new_tokens=1), 20_000
    network = networks["qwen2"]
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0))
    found = decode(network, [STARTS[1]], torch.zeros(count, dtype=torch.int64), sampling, stop(), seeds)
    with torch.no_grad():
        logits = network.base(STARTS[1][None]).logits[0, -1].double() / sampling.temperature
    ordered = logits.softmax(-1).sort(descending=True)
    kept = ordered.values[: sampling.top_k or None]
    before = kept.cumsum(0) / kept.sum() - kept / kept.sum()
    kept = kept[before < sampling.top_p]
    expected = torch.zeros(len(logits), dtype=torch.float64)
    expected[ordered.indices[: len(kept)]] = kept / kept.sum() * count
    observed = torch.bincount(found.tokens[:, 0], minlength=len(logits))
    assert observed[expected == 0].sum() == 0
    # Tokens that are expected less than five times are counted together.
    rare = expected < 5
    groups = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed.double(), expected)]
    usual = groups[1] > 0
    assert chisquare(groups[0][usual].numpy(), groups[1][usual].numpy()).pvalue > 1e-3
    assert usual.sum() > 2
