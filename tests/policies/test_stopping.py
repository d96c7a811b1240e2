"""Stop texts are found in decoded text, however the tokenizer cut it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny_language_models as tiny
from regimen.models import word_tokenizer
from regimen.policies.stopping import StopAt


@pytest.fixture(scope="module")
def bpe() -> Any:
    return tiny.tokenizer()


def first_stop(rule: StopAt, tokens: Sequence[int]) -> int | None:
    """How many tokens are sampled before the rule says stop."""
    row = torch.tensor([list(tokens)])
    return next((length for length in range(1, len(tokens) + 1) if bool(rule(row, length)[0])), None)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_an_end_token_stops(bpe: Any) -> None:
    rule = StopAt(bpe)
    assert first_stop(rule, [5, 9, bpe.eos_token_id, 8]) == 3
    assert first_stop(rule, [5, 9, 8]) is None


def test_further_end_tokens_stop(bpe: Any) -> None:
    assert first_stop(StopAt(bpe, ends=[9]), [5, 9, bpe.eos_token_id]) == 2


@pytest.mark.parametrize("stop", ["</answer>", "the dog", "t. the", "é", "。", "\n\n", "t "])
def test_a_stop_text_that_spans_tokens_stops_where_it_is_complete(bpe: Any, stop: str) -> None:
    text = f"say{stop}no more {stop}"
    tokens = ids_of(bpe, text)
    length = first_stop(StopAt(bpe, [stop]), tokens)
    assert length is not None
    assert stop in bpe.decode(tokens[:length])
    assert stop not in bpe.decode(tokens[: length - 1])


def test_stop_texts_of_the_tests_above_are_of_several_tokens(bpe: Any) -> None:
    cut = bpe.convert_ids_to_tokens(ids_of(bpe, "the cat</answer>no"))
    assert [token for token in cut if "</answer>" in token] == []
    assert len(ids_of(bpe, "。")) == 3


def test_a_token_that_goes_on_after_the_stop_text_stops(bpe: Any) -> None:
    tokens = ids_of(bpe, "a cat")
    assert bpe.convert_ids_to_tokens(tokens) == ["a", "Ġcat"]
    assert first_stop(StopAt(bpe, [" c"]), tokens) == 2


def test_a_space_between_words_stops_where_the_tokenizer_joins_with_spaces() -> None:
    tokenizer = word_tokenizer(["a", "b"])
    assert first_stop(StopAt(tokenizer, ["a "]), ids_of(tokenizer, "b a b")) == 3


def test_every_row_is_judged_by_itself(bpe: Any) -> None:
    rows = torch.tensor([ids_of(bpe, text) for text in ("x</answer>", "cat answer>", "a</answer s")])
    assert StopAt(bpe, ["</answer>"])(rows, rows.shape[1]).tolist() == [True, False, False]


def test_tokens_that_the_tokenizer_does_not_know_do_not_stop(bpe: Any) -> None:
    assert first_stop(StopAt(bpe, ["a"]), [len(bpe) + 5, len(bpe) + 6]) is None


@pytest.mark.parametrize("texts", [[""], ["a", ""], "stop"])
def test_empty_texts_and_one_text_for_several_are_refused(bpe: Any, texts: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of texts, none of them empty"):
        StopAt(bpe, texts)
