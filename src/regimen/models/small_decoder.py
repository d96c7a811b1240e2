"""Small language models with random weights, of the real classes, for tasks whose words are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PAD, BEGIN, END, UNKNOWN = "<pad>", "<begin>", "<end>", "<unknown>"


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of `transformers` that splits at spaces; every word is a token, and a prompt begins with `<begin>`.

    Raises:
        ValueError: a word is there twice, is empty or has a space in it, or is a special token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    every = [PAD, BEGIN, END, UNKNOWN, *words]
    odd = sorted(word for word, count in Counter(every).items() if count > 1 or word.split() != [word])
    if odd:
        raise ValueError(f"word_tokenizer: {odd[:5]}; expected words that are there once, without spaces")
    vocabulary = {word: index for index, word in enumerate(every)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # Without a decoder, words are joined with spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN
    )


def small_decoder(
    vocabulary: int, *, dim: int = 64, layers: int = 3, heads: int = 4, positions: int = 256, seed: int = 0
) -> nn.Module:
    """A `LlamaForCausalLM` (rotary positions, tied embeddings) with random weights.

    They are spread by `dim ** -0.5`: with the usual 0.02, a model of this size is stuck at chance for its first
    hundreds of updates.

    Args:
        vocabulary: tokens.
        dim, layers, heads: 64, 3 and 4 have 0.17 million parameters.
        positions: longest sequence.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        initializer_range=dim**-0.5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
