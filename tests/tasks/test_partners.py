"""Who a policy talks with: one partner for each dialogue, tools beside it, a guessing game and a calculator."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from regimen.tasks import OneByOne, Reply, WithTools
from regimen.tasks.partners import checked
from regimen.tasks.worlds.guess_number import GuessNumber, calculator


def play(game: GuessNumber, start: int, *turns: str) -> list[Reply]:
    partner = game(start, Random(0))
    return [partner.reply(turn) for turn in turns]


def test_the_game_answers_higher_lower_and_right() -> None:
    replies = play(GuessNumber(1, 7, 3), 4, "4", "6", "5")
    assert [reply.text for reply in replies] == ["higher", "lower", "right"]
    assert [reply.reward for reply in replies] == [0, 0, 1]
    assert [reply.done for reply in replies] == [False, False, True]
    assert [reply.success for reply in replies] == [False, False, True]


def test_the_last_guess_ends_the_game() -> None:
    replies = play(GuessNumber(1, 7, 2), 4, "4", "6")
    assert replies[-1] == Reply("over", done=True, facts={"valid": 1})


@pytest.mark.parametrize("turn", ["", "eight", "8", "0", "-1", "4 4", "4.0", "9" * 5000])
def test_what_is_no_number_of_the_range_costs_a_guess(turn: str) -> None:
    wrong, right = play(GuessNumber(1, 7, 2), 4, turn, "5")
    assert wrong == Reply("guess from 1 to 7", facts={"valid": 0})
    assert right.success


def test_starts_go_through_the_range_in_order() -> None:
    game = GuessNumber(-1, 1, 1)
    hidden = [next(n for n in (-1, 0, 1) if play(game, start, str(n))[0].success) for start in range(4)]
    assert hidden == [-1, 0, 1, -1]


def test_a_game_that_cannot_be_won_is_refused() -> None:
    with pytest.raises(ValueError, match="low=2, high=1, guesses=3; expected low <= high and at least one guess"):
        GuessNumber(2, 1)
    with pytest.raises(ValueError, match="guesses=0"):
        GuessNumber(guesses=0)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("calc 3 + 4", "7"),
        ("calc (1 + 7) // 2", "4"),
        (" calc -2 * 1.5 ", "-3"),
        ("calc 1 / 8", "0.125"),
        ("calc 1 / 0", "error"),
        ("calc", "error"),
        ("calc 2 ** 9", "error"),
        ("calc __import__('os')", "error"),
        ("calc " + "(" * 190 + "1" + ")" * 190, "error"),
        ("calc " + "1+" * 99 + "1", "100"),
        ("calc " + "9*" * 200 + "9", "error"),
        ("calculate 3", None),
        ("4", None),
    ],
)
def test_the_calculator(text: str, result: str | None) -> None:
    assert calculator(text) == result


def test_a_tool_answers_its_calls_and_the_partner_the_rest() -> None:
    partner = WithTools(GuessNumber(1, 7, 1)(3, Random(0)), [calculator], cost=0.1)
    assert partner.opening == "guess from 1 to 7"
    assert partner.reply("calc (1 + 7) / 2") == Reply("4", reward=-0.1, role="tool")
    assert partner.reply("4").success, "the call was no guess"


def test_every_dialogue_has_a_partner_and_noise_of_its_own() -> None:
    class Dice:
        opening = "roll"

        def __init__(self, start: int, random: Random) -> None:
            self.random = random

        def reply(self, text: str) -> Reply:
            return Reply(str(self.random.random()))

    env = OneByOne(Dice)
    openings, state = env.reset([1, 1, 2], [10, 11, 10])
    assert [opening.text for opening in openings] == ["roll"] * 3
    first, second, third = (reply.text for reply in env.step(state, [0, 1, 2], ["", "", ""]))
    assert first == third != second
    assert env.step(state, [2], [""])[0].text != third


def test_one_partner_that_raises_fails_alone() -> None:
    class Odd:
        opening = "go"

        def reply(self, text: str) -> Reply:
            return Reply(str(1 / int(text)))

    env = OneByOne(lambda start, random: Odd())
    _, state = env.reset([0, 0], [0, 0])
    bad, good = env.step(state, [0, 1], ["0", "2"])
    assert bad.failure == "the environment raised ZeroDivisionError: division by zero"
    assert (good.text, good.failure) == ("0.5", "")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (None, "the environment answered a NoneType, expected a Reply"),
        (Reply(b"x"), "the environment answered a bytes, expected a text"),  # type: ignore[arg-type]
        (Reply(reward=float("inf")), "the environment gave reward inf, expected a finite number"),
        (Reply(facts={"valid": "yes"}), "the environment gave valid 'yes', expected a finite number"),  # type: ignore[dict-item]
    ],
)
def test_a_reply_that_is_none_is_a_failure(reply: Any, why: str) -> None:
    assert checked(reply).failure == why
