"""PPO's, GRPO's, SAC's and IQL's objectives by name: sums of parts that may be written out, and continued, by hand."""

from __future__ import annotations

from regimen.functions.aggregate import Aggregate
from regimen.knobs import Knob
from regimen.objectives.base import Objective
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.implicit_value import AdvantageWeightedObjective, ImplicitValueObjective
from regimen.objectives.maximisers import Expectile, Maximiser
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.soft_actor import EntropyWeight, SoftActorObjective, TemperatureObjective
from regimen.objectives.td import TDObjective
from regimen.objectives.value import ValueObjective


def grpo(
    clip: float = 0.2,
    clip_high: float | None = None,
    *,
    kl_weight: float = 0.04,
    aggregate: Aggregate = "sequence",
    horizon: int | None = None,
) -> Objective:
    """GRPO's objective, `surrogate + kl_weight * kl` with both weighted alike (Shao et al. 2024, eq. 3 and 4).

    For a stage with `GroupRelativeAdvantage()`, and with `rules=[ReferenceRefresh()]` unless `kl_weight` stays 0.
    DAPO's is `grpo(0.2, 0.28, kl_weight=0, aggregate="token")`; Dr. GRPO's is `grpo(kl_weight=0,
    aggregate="constant", horizon=...)` with `GroupRelativeAdvantage(std=None)`.

    Args:
        clip, clip_high: see `clipped_surrogate`.
        kl_weight: default of the knob `kl_weight`.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
    """
    surrogate = ClippedSurrogateObjective(clip, clip_high, aggregate, horizon)
    return surrogate + Knob("kl_weight", kl_weight, low=0.0) * ReferenceKL("k3", aggregate, horizon)


def ppo(
    clip: float = 0.2,
    *,
    value_weight: float = 0.5,
    value_clip: float | None = None,
    entropy_weight: float = 0.0,
    reads: str | None = None,
) -> Objective:
    """PPO's objective, `surrogate + value_weight * value - entropy_weight * entropy` (Schulman et al. 2017, eq. 9).

    For a stage with `GAE()`, and an update that trains the members `policy` and `critic`.

    Args:
        clip: see `clipped_surrogate`.
        value_weight: default of the knob `value_weight`.
        value_clip: see `value_loss`.
        entropy_weight: default of the knob `entropy_weight`.
        reads: `"policy"` if the critic is a head on the policy's hidden states, see `ValueObjective`; `GAE` is then
            given the same.
    """
    surrogate = ClippedSurrogateObjective(clip, aggregate="token")
    value = Knob("value_weight", value_weight, low=0.0) * ValueObjective(value_clip, reads=reads)
    return surrogate + value - Knob("entropy_weight", entropy_weight, low=0.0) * EntropyBonus()


def sac(
    *,
    entropy_weight: EntropyWeight = "temperature",
    target_entropy: float | None = None,
    discount: Knob | float | None = None,
    n: int = 1,
) -> Objective:
    """SAC's objective, the losses of the critics, the actor and the temperature (Haarnoja et al. 2018b, alg. 1).

    No gradient of one flows into the others' weights, so one update may train all members (`policy`, `critic`,
    `temperature`) on the same minibatches; or give each objective an update of its own. For a stage with a
    `ReplayMemory(unit="transition")` and `rules=[ReferenceRefresh("critic_target", of="critic", mode="ema",
    decay=0.995)]`.

    Args:
        entropy_weight: the member that learns it, or a number (the default of a knob of that name) or knob: then there
            is no temperature to train.
        target_entropy: see `TemperatureObjective`.
        discount, n: see `TDObjective`.
    """
    critic = TDObjective(entropy_weight=entropy_weight, discount=discount, n=n)
    both = critic + SoftActorObjective(entropy_weight=entropy_weight)
    if not isinstance(entropy_weight, str):
        return both
    return both + TemperatureObjective(entropy_weight, target_entropy=target_entropy)


def iql(
    *,
    f: Maximiser | None = None,
    inverse_temperature: float = 3.0,
    max_weight: float = 100.0,
    discount: Knob | float | None = None,
) -> Objective:
    """IQL's objective, the losses of the value, the policy and the critic (Kostrikov et al. 2022, alg. 1).

    With another maximiser it is XQL's (`Gumbel`) or f-DVL's (`TotalVariation`, `ChiSquare`). No gradient of one flows
    into the others' weights, so one update may train all members (`value`, `policy`, `critic`); or give each objective
    an update of its own, in the order in which they stand here. For a stage that reads data, with
    `rules=[ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.995)]`.

    Args:
        f: draws the value up, `Expectile(0.9)` by default; see `ImplicitValueObjective`.
        inverse_temperature, max_weight: see `AdvantageWeightedObjective`.
        discount: see `TDObjective`.
    """
    policy = AdvantageWeightedObjective(inverse_temperature, max_weight)
    critic = TDObjective(target="value", policy=None, discount=discount)
    return ImplicitValueObjective(f or Expectile()) + policy + critic
