"""Text games: commands in, texts out, as TextWorld and ALFWorld have them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

import torch

from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.tasks.dialogue import DialogueTask
from regimen.tasks.partners import OneByOne, Reply
from regimen.tasks.worlds.guess_number import GuessNumber

UNKNOWN = ("nothing happens",)
"""How a game begins to answer what it cannot execute; in lower case."""


class TextGame(Protocol):
    """A game with the methods of `textworld.gym`."""

    def reset(self) -> tuple[str, Mapping[str, Any]]:
        """Begin; the opening text, and further facts."""
        ...

    def step(self, command: str) -> tuple[str, float, bool, Mapping[str, Any]]:
        """Execute a command: text, score so far, whether the game is over, and facts, `won` among them."""
        ...


class GamePartner:
    """One game as a `Partner`: 1 for winning, in the last turn; the fact `valid` says which commands did anything."""

    def __init__(self, game: TextGame, unknown: tuple[str, ...] = UNKNOWN) -> None:
        self.game, self.unknown = game, unknown
        self.opening = game.reset()[0]

    def reply(self, text: str) -> Reply:
        """What the game says to a command, which is the turn's first line."""
        lines = text.strip().splitlines()
        said, _, done, facts = self.game.step(lines[0] if lines else "")
        won = bool(facts.get("won", False))
        valid = not said.strip().lower().startswith(self.unknown)
        return Reply(said, float(won), done or won, won, facts={"valid": float(valid)})


@dataclass(frozen=True)
class TextGames:
    """Games by number, for `OneByOne`: the start `s` is game `s mod n`.

    Attributes:
        files: a file for each.
        load: a file to a game.
    """

    files: tuple[str, ...]
    load: Callable[[str], TextGame]

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("TextGames: there are no files; expected at least one game")

    def __call__(self, start: int, random: Random) -> GamePartner:
        """A game, begun."""
        return GamePartner(self.load(self.files[start % len(self.files)]))


def alfworld_game(file: str, max_steps: int = 50) -> TextGame:
    """A game of ALFWorld from its file, with the names of things as people write them."""
    import textworld.gym
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    facts = textworld.EnvInfos(won=True)
    name = textworld.gym.register_games([file], facts, max_episode_steps=max_steps, wrappers=[AlfredDemangler()])
    game: TextGame = textworld.gym.make(name)
    return game


def alfworld(split: str = "train", folder: str | None = None) -> TextGames:
    """All games of a split of ALFWorld (`train`, `valid_seen`, `valid_unseen`), in the order of their paths.

    `folder` is where `alfworld-download` has put them, `$ALFWORLD_DATA` by default.

    Raises:
        FileNotFoundError: there are none.
    """
    root = Path(folder or os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")).expanduser()
    files = sorted(str(path) for path in (root / "json_2.1.1" / split).rglob("game.tw-pddl"))
    if not files:
        raise FileNotFoundError(
            f"there are no games (game.tw-pddl) below {root / 'json_2.1.1' / split}; run alfworld-download, or set "
            "ALFWORLD_DATA to where they are"
        )
    return TextGames(tuple(files), alfworld_game)


@dataclass(frozen=True)
class TextGameWorld:
    """Games, and a language model that plays them.

    Attributes:
        games: `"guess"` a number, or `"alfworld"`.
        model: a folder, or a name on the Hugging Face hub; if empty, a small decoder that knows the words of `"guess"`.
        turns: of the policy in a game.
        lora_rank: of the adapters that are trained; `None` to train all weights.
        dtype: of the weights.
        held_out: games that evaluate; with `"alfworld"`, of its unseen rooms.
    """

    games: Literal["guess", "alfworld"] = "guess"
    model: str = ""
    turns: int = 3
    lora_rank: int | None = None
    dtype: str = "float32"
    held_out: int = 64

    def task(self, name: str) -> DialogueTask:
        """Dialogues with games, each of another start; the column `valid` tells which turns did anything."""
        if self.games == "guess":
            game = OneByOne(GuessNumber(guesses=self.turns))
            return DialogueTask(name, game, max_turns=self.turns, facts=("valid",), evaluation=range(7))
        train, unseen = alfworld("train"), alfworld("valid_unseen")
        files = (*unseen.files[: self.held_out], *train.files)
        first = min(self.held_out, len(unseen.files))
        return DialogueTask(
            name, OneByOne(TextGames(files, alfworld_game)), max_turns=self.turns, facts=("valid",),
            starts=range(first, len(files)), evaluation=range(first),
        )  # fmt: skip

    def policy(self) -> TokenPolicy:
        """The model, asked by its chat template."""
        if not self.model:
            tokenizer = word_tokenizer(GuessNumber().words)
            return TokenPolicy(small_decoder(len(tokenizer), layers=2), tokenizer, max_new_tokens=2)
        options = {"dtype": getattr(torch, self.dtype)}
        return TokenPolicy.from_pretrained(
            self.model, lora_rank=self.lora_rank, options=options, chat=True, max_new_tokens=64, stop=["\n"]
        )
