"""Rooms in which an object is to be found in a container, and brought to another room."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from regimen.functions.categorical import row_uniform
from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv

ROOMS, CONTAINERS = 4, 3
LOOK = ROOMS + 2 * CONTAINERS + 1
PLACE = LOOK - 1


class Workshop(TensorEnv):
    """The aim tells a container, in which an object lies, and the room to which it is to be brought.

    Actions: go to one of 4 rooms (0 to 3), open one of 3 containers (4 to 6), take the object out of one (7 to 9),
    place it (10), look (11). What is not possible does nothing: opening a container of another room, say, or placing
    the object where it does not belong. The reward is 1 for the object placed, which ends the episode; at the limit it
    is over for good. Which room a container stands in is not seen, and the same in all episodes.

    The copies see a vector: the room, the open containers, whether the object is held, the aim, and the share of the
    episode that has passed. Columns: `valid`, whether the action did anything; `valid_share`, of the steps so far;
    `success`; `credit`, 0.2 the first time that each of five goals in a row is reached (in the room, opened, taken, in
    the other room with it, placed), for comparison only.

    Attributes:
        places: int64 `[3]`, the room of each container.
    """

    def __init__(self, count: int, *, limit: int = 30, seed: int = 0, device: torch.device | str = "cpu") -> None:
        """Make the copies.

        Args:
            count: how many.
            limit: steps of an episode.
            seed: where the containers stand.
            device: see `TensorEnv`.
        """
        super().__init__(count, limit=limit, limit_terminates=True, device=device)
        order = torch.randperm(ROOMS, generator=torch.Generator().manual_seed(seed))
        self.places = order[:CONTAINERS].to(self.device)
        self.observation_space = spaces.Box(0.0, 1.0, (2 * ROOMS + 2 * CONTAINERS + 2,))
        self.action_space = spaces.Discrete(LOOK + 1)

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """An aim, and a room to start in; the object belongs into another room than the container's."""
        room, container, further = (row_uniform(seeds, -draw - torch.ones_like(seeds)) for draw in (1, 2, 3))
        container = (container * CONTAINERS).long()
        home = (self.places[container] + 1 + (further * (ROOMS - 1)).long()) % ROOMS
        nothing = torch.zeros_like(seeds)
        return {
            "room": (room * ROOMS).long(),
            "container": container,
            "home": home,
            "open": torch.zeros(len(seeds), CONTAINERS, dtype=torch.bool, device=seeds.device),
            "held": nothing.bool(),
            "placed": nothing.bool(),
            "reached": nothing,
            "valid": nothing,
        }

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Do what is possible."""
        state = self.state
        going, opening = actions < ROOMS, (actions >= ROOMS) & (actions < ROOMS + CONTAINERS)
        taking = (actions >= ROOMS + CONTAINERS) & (actions < PLACE)
        which = torch.where(opening, actions - ROOMS, actions - ROOMS - CONTAINERS).clamp(0, CONTAINERS - 1)
        here = self.places[which] == state["room"]
        is_open = state["open"].gather(1, which[:, None]).squeeze(1)
        goes = going & (actions != state["room"])
        opens = opening & here & ~is_open
        takes = taking & here & is_open & (which == state["container"]) & ~state["held"]
        places = (actions == PLACE) & state["held"] & (state["room"] == state["home"])
        valid = goes | opens | takes | places | (actions == LOOK)
        changed = {
            "room": torch.where(goes, actions, state["room"]),
            "open": state["open"] | (one_hot(which, CONTAINERS).bool() & opens[:, None]),
            "held": state["held"] | takes,
            "placed": places,
            "valid": state["valid"] + valid,
        }
        changed["reached"] = torch.maximum(state["reached"], self._reached({**state, **changed}))
        told = {
            "valid": valid.float(),
            "valid_share": changed["valid"] / (self.time + 1),
            "success": places.float(),
            "credit": (changed["reached"] - state["reached"]) * 0.2,
        }
        return changed, places.float(), places, told

    def _reached(self, state: Mapping[str, Tensor]) -> Tensor:
        """How many of the five goals are reached as things stand, int64 `[N]`."""
        there = self.places[state["container"]] == state["room"]
        is_open = state["open"].gather(1, state["container"][:, None]).squeeze(1)
        found = torch.where(is_open, 2, there.long())
        return torch.where(
            state["placed"], 5, torch.where(state["held"], 3 + (state["room"] == state["home"]).long(), found)
        )

    def expert(self) -> Tensor:
        """An action for each copy that leads on by the shortest way, int64 `[N]`."""
        state = self.state
        place = self.places[state["container"]]
        is_open = state["open"].gather(1, state["container"][:, None]).squeeze(1)
        fetch = torch.where(is_open, ROOMS + CONTAINERS + state["container"], ROOMS + state["container"])
        fetch = torch.where(state["room"] == place, fetch, place)
        bring = torch.where(state["room"] == state["home"], PLACE, state["home"])
        return torch.where(state["held"], bring, fetch)

    def observe(self) -> Observations:
        """What a copy sees."""
        state = self.state
        parts = [
            one_hot(state["room"], ROOMS),
            state["open"],
            state["held"][:, None],
            one_hot(state["container"], CONTAINERS),
            one_hot(state["home"], ROOMS),
            (self.time / self.limit)[:, None],
        ]
        return torch.cat([part.float() for part in parts], 1)


def expert_episodes(workshop: Workshop, seed: int = 0) -> TensorDict:
    """An episode of every copy, acted by its `expert`: `observations`, `actions` and `mask`, a row `[N]` for each."""
    seeds = torch.randint(2**31, (workshop.count,), generator=torch.Generator().manual_seed(seed))
    seen = workshop.reset(torch.ones(workshop.count, dtype=torch.bool), seeds, {})
    alive, steps = torch.ones_like(workshop.time, dtype=torch.bool), []
    while bool(alive.any()):
        actions = workshop.expert()
        steps.append({"observations": seen, "actions": actions, "mask": alive})
        change = workshop.step(actions)
        seen, alive = change.observations, alive & ~change.terminated
    rows = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return TensorDict(rows, batch_size=[workshop.count])
