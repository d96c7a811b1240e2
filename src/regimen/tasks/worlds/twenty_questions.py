"""Twenty questions about a few objects: attributes to be asked for, one object to be guessed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from regimen.tasks.partners import Reply


@dataclass(frozen=True)
class TwentyQuestions:
    """Games in which the policy finds out which of `2^attributes` objects is meant.

    Object `o5` has the attributes `a0` and `a2`, the bits of its number. `has a2` is answered with `yes` or `no`, and
    so is `guess o5`; all else with `invalid`. Every turn earns -1, but the one that guesses right earns 0 and ends the
    game, and so does, with -1, the last turn. The fact `valid` tells what was understood.

    Used as the environment `OneByOne(TwentyQuestions())`. The start `s` means the object `s mod 2^attributes`.

    Attributes:
        attributes: how many; every combination of them is an object.
        turns: how many there are.
    """

    attributes: int = 4
    turns: int = 10

    def __post_init__(self) -> None:
        if min(self.attributes, self.turns) < 1:
            raise ValueError(f"TwentyQuestions: attributes={self.attributes}, turns={self.turns}; expected at least 1")

    def __call__(self, start: int, random: Random) -> QuestionGame:
        """A game."""
        return QuestionGame(self, start % self.objects)

    @property
    def objects(self) -> int:
        """How many there are."""
        return 2**self.attributes

    @property
    def utterances(self) -> tuple[str, ...]:
        """All that is understood."""
        asked = [f"has a{number}" for number in range(self.attributes)]
        return (*asked, *(f"guess o{number}" for number in range(self.objects)))

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of a game, for a tokenizer of words."""
        things = [*(f"a{n}" for n in range(self.attributes)), *(f"o{n}" for n in range(self.objects))]
        return ("begin", "has", "guess", *things, "yes", "no", "invalid", "right", "over")

    def half_random(self, text: str, random: Random) -> str:
        """A `Script`: half of the time any utterance, else the next attribute not asked for, then the object meant."""
        if random.random() < 0.5:
            return random.choice(self.utterances)
        known = self._known(text)
        asked = next((number for number in range(self.attributes) if number not in known), None)
        if asked is not None:
            return f"has a{asked}"
        return f"guess o{sum(2**number for number, has in known.items() if has)}"

    def _known(self, text: str) -> dict[int, bool]:
        """The attributes that were asked for in a game so far, and the answers."""
        words = text.split()
        triples = zip(words, words[1:], words[2:], strict=False)
        return {int(b[1:]): c == "yes" for a, b, c in triples if a == "has" and b in self.words and c in ("yes", "no")}


class QuestionGame:
    """One game, a `Partner`."""

    opening = "begin"

    def __init__(self, settings: TwentyQuestions, meant: int) -> None:
        self.settings, self.meant, self.taken = settings, meant, 0

    def reply(self, text: str) -> Reply:
        """`yes`, `no` or `invalid`; `right` after the right guess, `over` after the last turn."""
        self.taken += 1
        said = " ".join(text.split())
        facts = {"valid": float(said in self.settings.utterances)}
        if said == f"guess o{self.meant}":
            return Reply("right", done=True, success=True, facts=facts)
        if self.taken == self.settings.turns:
            return Reply("over", reward=-1.0, done=True, facts=facts)
        return Reply(self._answer(said), reward=-1.0, facts=facts)

    def _answer(self, said: str) -> str:
        if said not in self.settings.utterances:
            return "invalid"
        kind, thing = said.split()
        return "yes" if kind == "has" and self.meant >> int(thing[1:]) & 1 else "no"
