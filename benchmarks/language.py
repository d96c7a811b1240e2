"""The language models, words and prompts of the jobs, the same for both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regimen.models.small_decoder import small_decoder, word_tokenizer

SPECIAL = 4
NEW_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """A decoder's settings: words, width, layers, heads."""

    words: int
    dim: int
    layers: int
    heads: int


SIZES = {
    "0.15M": Size(words=60, dim=64, layers=3, heads=4),
    "1M": Size(words=1020, dim=128, layers=4, heads=4),
    "7M": Size(words=1020, dim=256, layers=8, heads=8),
}


def tokenizer(size: Size) -> Any:
    """Words `w0`, `w1`, ... of which the model knows all but the last, which is named as the end of a text.

    No model of `decoder` can say it, so every completion has as many tokens as it may.
    """
    words = word_tokenizer([f"w{i}" for i in range(size.words)] + ["<never>"])
    words.eos_token = "<never>"
    words.padding_side = "left"
    return words


def ending_tokenizer(size: Size) -> Any:
    """The same words, with an end of a text that the models know."""
    return word_tokenizer([f"w{i}" for i in range(size.words)])


def decoder(size: Size, seed: int) -> nn.Module:
    """A Llama with random weights, in evaluation mode."""
    model = small_decoder(
        SPECIAL + size.words, dim=size.dim, layers=size.layers, heads=size.heads, positions=256, seed=seed
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = SPECIAL + size.words
    return model.eval()


def prompts(count: int, size: Size, seed: int) -> list[str]:
    """Texts of 15 to 23 random words (16 to 24 tokens with the one for the beginning)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(15, 24, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(size.words, (n,), generator=generator).tolist()) for n in lengths]


def even_words(text: str) -> float:
    """The reward: share of words with an even number."""
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


@dataclass
class Watch:
    """Seconds from the end of the warm-up steps to the last: on the wall, and of this process's processor time."""

    warm_up: int
    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    def step(self) -> None:
        """A step is over."""
        self.steps += 1
        now = (time.perf_counter(), time.process_time())
        if self.steps == self.warm_up:
            self._from = now
        elif self.steps > self.warm_up:
            self.wall, self.cpu = (b - a for a, b in zip(self._from, now, strict=True))

    @property
    def measured(self) -> int:
        """Steps after the warm-up."""
        return self.steps - self.warm_up


def timed(work: Callable[[int], Any], warm_up: int, steps: int) -> Watch:
    """Watch a piece of work that is done again and again; it is given the number of the turn."""
    watch = Watch(warm_up)
    for turn in range(warm_up + steps):
        work(turn)
        watch.step()
    return watch
