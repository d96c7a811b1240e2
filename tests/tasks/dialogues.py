"""Partners that say given things, policies that do, and small decoders, for tests of dialogues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regimen import Knobs
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.decoding import Completions
from regimen.policies.token import TokenPolicy
from regimen.rewards import EnvironmentReward, Scene, judge
from regimen.rollout import Rollout
from regimen.tasks import DialogueTask, OneByOne, Reply
from regimen.tasks.worlds.guess_number import GuessNumber

GAME = GuessNumber()
WORDS = ("go", "on", "well", "yes", "no", "end")


class Talk:
    """A partner that says some replies one after another, then `end` with a reward of 1."""

    def __init__(self, replies: Sequence[str | Reply], opening: str = "go") -> None:
        self.opening, self._left = opening, list(replies)

    def reply(self, text: str) -> Reply:
        if not self._left:
            return Reply("end", reward=1.0, done=True, success=True)
        following = self._left.pop(0)
        return following if isinstance(following, Reply) else Reply(following)


def talks(*replies: str | Reply, opening: str = "go") -> OneByOne:
    return OneByOne(lambda start, random: Talk(replies, opening))


class Scripted(TokenPolicy):
    """A policy that says what a function makes of the text before it, and remembers how it was asked."""

    def __init__(self, say: Callable[[str], str], words: Sequence[str] = WORDS, **options: Any) -> None:
        tokenizer = word_tokenizer(words)
        model = small_decoder(len(tokenizer), dim=8, layers=1, heads=1, positions=64)
        super().__init__(model, tokenizer, **{"max_new_tokens": 4, **options})
        self.say, self.asked = say, list[list[str]]()

    def complete(
        self, starts: Sequence[Tensor], knobs: Mapping[str, float], rng: torch.Generator, images: Any = None
    ) -> Completions:
        texts = self.tokenizer.batch_decode([start.tolist() for start in starts], skip_special_tokens=True)
        self.asked.append(texts)
        end = torch.tensor([self.tokenizer.eos_token_id])
        said = [torch.cat([self.encode_answer(self.say(text)), end]) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(part) for part in said])[:, None]
        return Completions(tokens, mask, -mask.float(), None, torch.ones(len(said), dtype=torch.bool))


def halving(text: str) -> str:
    """The middle of what is left after the answers so far."""
    words = text.split()
    low, high = int(words[2]), int(words[4])
    for guess, answer in zip(words[5::2], words[6::2], strict=False):
        low, high = (int(guess) + 1, high) if answer == "higher" else (low, int(guess) - 1)
    return str((low + high) // 2)


def tiny(kind: str = "llama", tokenizer: Any = None, **options: Any) -> TokenPolicy:
    tokenizer = word_tokenizer(GAME.words) if tokenizer is None else tokenizer
    if kind == "llama":
        return TokenPolicy(small_decoder(len(tokenizer), dim=16, layers=2, heads=2, positions=96), tokenizer, **options)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=2, n_head=2)
    return TokenPolicy(GPT2LMHeadModel(config), tokenizer, **options)


def collect(task: DialogueTask, policy: TokenPolicy, size: int = 8, seed: int = 0, **knobs: float) -> Rollout:
    board = Knobs.of(policy, task, **knobs)
    return task.collect({"policy": policy}, board, torch.Generator().manual_seed(seed), size)


def judged(rollout: Rollout) -> Rollout:
    return judge(EnvironmentReward(), rollout, Scene())[0]
