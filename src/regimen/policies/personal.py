"""A policy that first finds out whom it has before it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.models.latent_reward import LatentReward, Pairs
from regimen.models.torsos import Observations
from regimen.policies.acting import Acted, Actor


class PersonalPolicy:
    """Acts as a policy does for a user whom a `LatentReward` infers from the pairs that the user has labelled.

    The environment shows a table with the entries `state` and `pairs` (a table of `first`, `second`, `label`). At the
    start of an episode the latent is the posterior's mean; it is remembered to the episode's end, and the policy sees a
    table of `state` and `condition [N, Z]`, as `Conditioned` makes it in training.
    """

    def __init__(self, policy: Actor, reward_model: LatentReward) -> None:
        self.policy, self.reward_model = policy, reward_model

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies; the memory is `[N, Z]`."""
        assert isinstance(observations, TensorDict), "a table, see above"
        seen = observations.to(rng.device)
        if memory is None:
            memory = torch.zeros(len(begins), self.reward_model.latent, device=rng.device)
        if bool(begins.any()):
            known = self.reward_model.infer(Pairs.of(seen["pairs"])).mean
            memory = torch.where(begins.to(rng.device)[:, None], known, memory)
        shown = TensorDict({"state": seen["state"], "condition": memory}, batch_size=[len(memory)])
        acted = self.policy.act(shown, None, begins, knobs, rng)
        return Acted(acted.actions, acted.logprobs, memory)
