"""Small builders that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen.knobs import Knobs
from regimen.models import MLPDenoiser
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.worlds.digits import DigitsWorld

SHAPE = (1, 2, 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of trained starts."""
    monkeypatch.setenv("REGIMEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_policy() -> Callable[..., FlowPolicy]:
    """`tiny_policy(seed=0, **options)`: a flow policy on 1 x 2 x 2 images with two conditions."""

    def build(seed: int = 0, **options: Any) -> FlowPolicy:
        torch.manual_seed(seed)
        denoiser = MLPDenoiser(SHAPE, 2, width=16, blocks=1)
        # Both start at 0, where neither state, time nor condition has an effect.
        torch.nn.init.normal_(denoiser.out.weight, std=0.1)
        torch.nn.init.normal_(denoiser.film.weight, std=0.5)
        return FlowPolicy(denoiser, SHAPE, **{"sampling_steps": 4, "evaluation_steps": 8, **options})

    return build


@pytest.fixture
def contexts() -> Callable[[int], TensorDict]:
    """`contexts(count)`: contexts of a tiny policy."""
    return lambda count: TensorDict({"condition": torch.arange(count) % 2}, batch_size=[count])


@pytest.fixture
def sampled(
    tiny_policy: Callable[..., FlowPolicy], contexts: Callable[[int], TensorDict]
) -> Callable[..., tuple[FlowPolicy, Rollout]]:
    """`sampled(count=8, knobs={...}, **options)`: a tiny policy and a rollout of its own."""

    def build(count: int = 8, knobs: dict[str, float] | None = None, **options: Any) -> tuple[FlowPolicy, Rollout]:
        policy = tiny_policy(**options)
        board = Knobs.of(policy, **(knobs or {}))
        return policy, policy.sample(contexts(count), board, torch.Generator().manual_seed(1))

    return build


@pytest.fixture
def tiny_rollout() -> Callable[..., Rollout]:
    """`tiny_rollout(batch=6, steps=4, group_size=2, task="a", **fields)`: random images, full masks."""

    def build(batch: int = 6, steps: int = 4, group_size: int = 2, task: str = "a", **fields: Any) -> Rollout:
        rng = torch.Generator().manual_seed(7)
        settings: dict[str, Any] = {
            "task": task,
            "group": torch.arange(batch) // group_size,
            "mask": torch.ones(batch, steps, dtype=torch.bool),
            "context": {"condition": torch.arange(batch) // group_size % 2},
            "columns": {"image": torch.rand(batch, *SHAPE, generator=rng)},
            "observations": torch.randn(batch, steps, 3, generator=rng),
            "actions": torch.randn(batch, steps, 2, generator=rng),
            **fields,
        }
        return Rollout.create(**settings)

    return build


@pytest.fixture(scope="session")
def digits() -> DigitsWorld:
    return DigitsWorld(0)
