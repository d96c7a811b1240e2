"""Small decoders and their word tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from regimen.models import small_decoder, word_tokenizer

WORDS = ["12", "+", "=", "</think>", ";"]


def test_every_word_is_a_token_and_a_prompt_begins_with_begin() -> None:
    tokenizer = word_tokenizer(WORDS)
    assert len(tokenizer) == 4 + len(WORDS)
    assert tokenizer("12 + 12 =")["input_ids"] == [1, 4, 5, 4, 6]
    assert tokenizer("12 + 12 =", add_special_tokens=False)["input_ids"] == [4, 5, 4, 6]
    assert tokenizer("")["input_ids"] == [1]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_texts_come_back_with_one_space_between_words(tmp_path: Path) -> None:
    tokenizer, text = word_tokenizer(WORDS), "12 + 12 = ; </think>"
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each(text)["input_ids"]
        assert each.decode([*ids, 2], skip_special_tokens=True) == text


def test_an_unknown_word_is_a_token_of_its_own() -> None:
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer("12 13")["input_ids"] == [1, 4, 3]


@pytest.mark.parametrize("words", [["a", "a"], ["a", ""], ["a b"], ["a\tb"], ["a", "<pad>"]])
def test_words_that_are_not_tokens_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="expected words that are there once, without spaces"):
        word_tokenizer(words)


def test_the_default_has_the_stated_size() -> None:
    model = small_decoder(20)
    assert 0.15e6 < sum(p.numel() for p in model.parameters()) < 0.18e6


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = small_decoder(9, dim=8), small_decoder(9, dim=8), small_decoder(9, dim=8, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
