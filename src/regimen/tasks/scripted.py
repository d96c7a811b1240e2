"""Dialogues that a script speaks in a policy's place: demonstrations for a policy to imitate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regimen.policies.decoding import Completions
from regimen.policies.token import TokenPolicy
from regimen.tasks.dialogue import DialogueTask

Script = Callable[[str, Random], str]
"""The text so far, and a random stream, to what is said next."""


class ScriptedSpeaker:
    """Speaks as a script says, with the tokens and the chat template of a policy."""

    def __init__(self, policy: TokenPolicy, script: Script) -> None:
        self.policy, self.script = policy, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def complete(
        self, starts: Sequence[Tensor], knobs: Mapping[str, float], rng: torch.Generator, images: Any = None
    ) -> Completions:
        """What the script says after each of some sequences, each with the end-of-text token."""
        seeds = torch.randint(2**62, (len(starts),), generator=rng, device=rng.device).tolist()
        texts = self.policy.decode(list(starts))
        end = torch.tensor([self.policy.tokenizer.eos_token_id])
        said = [self.script(text, Random(seed)) for text, seed in zip(texts, seeds, strict=True)]
        rows = [torch.cat([self.policy.encode_answer(text), end]) for text in said]
        mask = torch.arange(max(len(row) for row in rows)) < torch.tensor([len(row) for row in rows])[:, None]
        tokens = pad_sequence(rows, batch_first=True)
        return Completions(tokens, mask, torch.zeros(mask.shape), None, torch.ones(len(rows), dtype=torch.bool))


def scripted_dialogues(
    task: DialogueTask, policy: TokenPolicy, script: Script, starts: Sequence[int], seed: int = 0
) -> TensorDict:
    """Dialogues of a script with a task's environment, as rows for a `DatasetTask`: one for each start.

    The policy gives the tokens and imitates the script's; the columns are those of `DialogueTask`, texts left out.
    """
    knobs = {knob.name: knob.default for knob in (*policy.knobs, *task.knobs)} | {"temperature": 0.0}
    speaker: Any = ScriptedSpeaker(policy, script)
    rollout = task.play(speaker, starts, knobs, torch.Generator(policy.device).manual_seed(seed))
    numbers = {name: value for name, value in rollout.columns.items() if isinstance(value, Tensor)}
    steps = {name: getattr(rollout, name) for name in ("actions", "mask", "loss_mask", "segment", "discount")}
    return TensorDict({**steps, **numbers}, [len(rollout)], device=policy.device)
