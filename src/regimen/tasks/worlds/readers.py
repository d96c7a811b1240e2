"""Readers who judge texts by different aspects, from rated answers such as UltraFeedback's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from regimen.tasks.preferences import preference_rows

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of answers to one prompt.

    Attributes:
        texts: prompt and answer, each text once.
        aspects: names of the aspects.
        index: int64 `[P, 2]`, the texts of each pair.
        ahead: `[P, A]`, by how much the first is rated above the second, in each aspect.
    """

    texts: list[str]
    aspects: tuple[str, ...]
    index: Tensor
    ahead: Tensor


def rated_answers(source: Path | str) -> list[dict[str, Any]]:
    """Records in UltraFeedback's form: a file of JSON lines, or a data set by its name on the hub."""
    if Path(source).suffix == ".jsonl":
        return [json.loads(line) for line in Path(source).read_text().splitlines() if line.strip()]
    import datasets

    return list(datasets.load_dataset(str(source), split="train"))


def rated_pairs(records: Iterable[Mapping[str, Any]], aspects: Sequence[str] = ASPECTS) -> RatedPairs:
    """All pairs of answers on whose order two aspects disagree; answers without a rating in some aspect are left out.

    Raises:
        ValueError: there is no such pair.
    """
    texts, index, ahead = list[str](), list[tuple[int, int]](), list[list[float]]()
    for record in records:
        rated = [(answer["response"], ratings_of(answer, aspects)) for answer in record["completions"]]
        known = [(text, ratings) for text, ratings in rated if ratings is not None]
        first = len(texts)
        texts += [f"{record['instruction']}\n\n{text}" for text, _ in known]
        for a, b in combinations(range(len(known)), 2):
            differences = [x - y for x, y in zip(known[a][1], known[b][1], strict=True)]
            if min(differences) < 0 < max(differences):
                index.append((first + a, first + b))
                ahead.append(differences)
    if not index:
        raise ValueError(
            f"rated_pairs: no two answers are ordered differently by {', '.join(aspects)}; give more records"
        )
    return RatedPairs(texts, tuple(aspects), torch.tensor(index), torch.tensor(ahead))


def ratings_of(answer: Mapping[str, Any], aspects: Sequence[str]) -> list[float] | None:
    """An answer's rating by every aspect; `None` if it lacks one."""
    told = [str(answer["annotations"][aspect]["Rating"]) for aspect in aspects]
    return [float(rating) for rating in told] if all(rating.isdecimal() for rating in told) else None


@torch.no_grad()
def text_features(texts: Sequence[str], model: str, device: str = "cpu", batch: int = 16, longest: int = 512) -> Tensor:
    """The last hidden state at each text's last token, by a frozen language model of `transformers`; `[n, D]`.

    Args:
        texts: of which the last `longest` tokens are read.
        model: its name on the hub, or a folder.
        device, batch, longest: where it runs, and how much at once.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left", padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network, found = AutoModel.from_pretrained(model).eval().to(device), []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        read = tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=longest).to(device)
        hidden = network(**read).last_hidden_state
        last = read["attention_mask"].sum(1) - 1
        found.append(hidden[torch.arange(len(part), device=device), last].float().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Readers:
    """Users who each prefer texts by one aspect, which is their kind.

    Attributes:
        features: `[n, D]` of the texts.
        pairs: which are compared.
        tells: whether a text's features tell the reader's kind (one-hot).
    """

    features: Tensor
    pairs: RatedPairs
    tells: bool = False

    @classmethod
    def split(
        cls, records: Sequence[Mapping[str, Any]], model: str, tells: bool, device: str = "cpu", held_out: float = 0.1
    ) -> tuple[Readers, Readers]:
        """Readers of some prompts' answers, and of the last ones', scaled alike."""
        cut = max(int(len(records) * (1 - held_out)), 1)
        parts = [rated_pairs(records[:cut]), rated_pairs(records[cut:])]
        features = [text_features(part.texts, model, device) for part in parts]
        mean, scale = features[0].mean(0), features[0].std(0).clamp(min=1e-6)
        first, second = (cls((f - mean) / scale, part, tells) for f, part in zip(features, parts, strict=True))
        return first, second

    @property
    def states(self) -> int:
        """Numbers of a text as it is shown."""
        return self.features.shape[1] + self.pairs.ahead.shape[1] * self.tells

    def sets(self, count: int, pairs: int, rng: torch.Generator) -> TensorDict:
        """Rows of `preference_rows`: readers of random kinds, each asked about pairs that their aspect orders.

        Raises:
            ValueError: an aspect orders none.
        """
        kinds = self.pairs.ahead.shape[1]
        user = torch.randint(kinds, (count,), generator=rng)
        ordered = [self._ordered(kind) for kind in range(kinds)]
        drawn = torch.stack(
            [ordered[kind][torch.randint(len(ordered[kind]), (pairs,), generator=rng)] for kind in user]
        )
        first, second = (self._shown(self.pairs.index[drawn, side], user) for side in (0, 1))
        label = (self.pairs.ahead[drawn, user[:, None]] > 0).float()
        return preference_rows(first, second, label, user=user)

    def _ordered(self, kind: int) -> Tensor:
        """int64, the pairs that an aspect orders."""
        pairs = (self.pairs.ahead[:, kind] != 0).nonzero().flatten()
        if not len(pairs):
            raise ValueError(
                f"Readers: {self.pairs.aspects[kind]} orders no pair of {len(self.pairs.index)}; give more records"
            )
        return pairs

    def _shown(self, texts: Tensor, user: Tensor) -> Tensor:
        """`[B, N, 1, S]` of texts `[B, N]`."""
        features = self.features[texts]
        if self.tells:
            kind = one_hot(user, self.pairs.ahead.shape[1]).float()
            features = torch.cat([features, kind[:, None].expand(-1, texts.shape[1], -1)], -1)
        return features[:, :, None]
