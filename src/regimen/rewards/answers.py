"""Rewards on an answer: right or wrong by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regimen.functions.answers import tag_text
from regimen.rewards.base import Reward, Scene, Score
from regimen.rewards.text import Failure, field_of, score_each
from regimen.rollout import Rollout

Verifier = Callable[[str, Any], bool | float]


class AnswerReward(Reward):
    """Whether a rule finds the answer right, `[B]`, component `correct`.

    A text without an answer is wrong. Where the column `verifiable` is False the reward is *not applicable*; where
    the verifier raises (an expected answer that cannot be read, say) the sample has *failed*.
    """

    def __init__(
        self,
        verifier: Verifier,
        right: float = 1.0,
        wrong: float = 0.0,
        tag: str | Callable[[str], str | None] | None = None,
        name: str = "correct",
        *,
        expected: str = "answer",
        untagged: bool = False,
    ) -> None:
        """Make the reward.

        Args:
            verifier: `(answer, expected) -> bool`, or a grade in [0, 1] between wrong and right: `exact_match`,
                `numeric_match`, `choice_match`, `math_match`, or your own.
            right: value of a right answer.
            wrong: value of a wrong one.
            tag: the tag whose first occurrence holds the answer; or a function that finds it (`boxed_text`,
                `hash_answer`, `last_number`); the whole text by default.
            name: of the component.
            expected: column or context entry with the expected answer.
            untagged: take the whole text where the tag is missing.
        """
        self.verifier, self.right, self.wrong, self.name = verifier, right, wrong, name
        self.tag, self.expected, self.untagged = tag, expected, untagged

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """`right`, `wrong` or a grade between for each sample."""
        texts, expected = field_of(rollout, "text"), field_of(rollout, self.expected)
        verifiable = [True] * len(texts)
        if "verifiable" in rollout.columns.keys():  # noqa: SIM118
            verifiable = rollout["verifiable"].bool().tolist()
        values = [
            self._value(text, wanted) if applies else None
            for text, wanted, applies in zip(texts, expected, verifiable, strict=True)
        ]
        return score_each(values, self.name, rollout.mask.device)

    def _value(self, text: str, expected: Any) -> float | Failure:
        answer = self.answer_in(text)
        if answer is None:
            return self.wrong
        try:
            grade = float(self.verifier(answer, expected))
        except (TimeoutError, ImportError):
            # The judge's time limit, or an extra that is missing for every sample alike.
            raise
        except Exception as error:
            return Failure(f"the verifier raised {type(error).__name__}: {error}")
        return self.wrong + (self.right - self.wrong) * grade

    def answer_in(self, text: str) -> str | None:
        """The answer that a text gives, if it gives one."""
        if self.tag is None:
            return text.strip()
        found = tag_text(text, self.tag) if isinstance(self.tag, str) else self.tag(text)
        return text.strip() if found is None and self.untagged else found
