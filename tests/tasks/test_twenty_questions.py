"""Twenty questions: what is answered and paid, the best play, and dialogues that a script speaks."""

from __future__ import annotations

from random import Random

import pytest
import torch

from regimen import Knobs
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.tasks import DialogueTask, OneByOne, ScriptedSpeaker, scripted_dialogues
from regimen.tasks.worlds.twenty_questions import TwentyQuestions

GAME = TwentyQuestions()


def policy(game: TwentyQuestions = GAME) -> TokenPolicy:
    words = word_tokenizer(game.words)
    return TokenPolicy(small_decoder(len(words), dim=8, layers=1, heads=1, positions=64), words, max_new_tokens=4)


def by_halves(text: str, random: Random) -> str:
    """Ask until two objects are left, then guess them: half of the objects need a second guess."""
    known = GAME._known(text)
    if len(known) < GAME.attributes - 1:
        return f"has a{len(known)}"
    first = sum(2**number for number, has in known.items() if has)
    return f"guess o{first + 8}" if f"guess o{first}" in text else f"guess o{first}"


def test_a_game() -> None:
    game = GAME(5, Random(0))
    replies = [game.reply(text) for text in ("has a0", "has a1", "tell me", "guess o4", "guess  o5")]
    assert [reply.text for reply in replies] == ["yes", "no", "invalid", "no", "right"]
    assert [reply.reward for reply in replies] == [-1, -1, -1, -1, 0]
    assert [reply.facts["valid"] for reply in replies] == [1, 1, 0, 1, 1]
    assert (replies[-1].done, replies[-1].success, replies[-2].done) == (True, True, False)
    assert len(GAME.utterances) == 20


def test_the_last_turn_ends_the_game() -> None:
    game = TwentyQuestions(2, 2)(0, Random(0))
    game.reply("has a0")
    last = game.reply("guess o3")
    assert (last.text, last.reward, last.done, last.success) == ("over", -1.0, True, False)


def test_the_best_play_earns_three_and_a_half() -> None:
    task = DialogueTask("game", OneByOne(GAME), max_turns=10, evaluation=range(16))
    speaker = ScriptedSpeaker(policy(), by_halves)
    found = task.evaluate({"policy": speaker}, Knobs.of(speaker, task), torch.Generator().manual_seed(0))
    assert found.metrics["return"] == -3.5
    assert found.metrics["success"] == 1.0


def test_somebody_who_asks_at_random_half_of_the_time() -> None:
    rows = scripted_dialogues(
        DialogueTask("game", OneByOne(GAME), max_turns=10, evaluation=()), policy(), GAME.half_random, range(64)
    )
    again = scripted_dialogues(
        DialogueTask("game", OneByOne(GAME), max_turns=10, evaluation=()), policy(), GAME.half_random, range(64)
    )
    assert torch.equal(rows["actions"], again["actions"])
    assert 0.5 < float(rows["success"].float().mean()) < 1
    words = policy().tokenizer.convert_ids_to_tokens(rows["actions"][0][rows["loss_mask"][0]].tolist())
    assert words[2::3] == ["<end>"] * (len(words) // 3)


def test_it_asks_for_what_is_not_known_and_then_guesses() -> None:
    class Sure(Random):
        def random(self) -> float:
            return 1.0

    said = [GAME.half_random(text, Sure()) for text in (
        "begin", "begin has a0 yes", "begin has a1 no has a0 yes guess o3 no",
        "has a0 yes has a1 no has a2 yes has a3 no",
    )]  # fmt: skip
    assert said == ["has a0", "has a1", "has a2", "guess o5"]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="TwentyQuestions: attributes=0, turns=3; expected at least 1"):
        TwentyQuestions(0, 3)
