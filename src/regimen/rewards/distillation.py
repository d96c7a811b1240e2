"""Bonuses from how badly a network predicts what a random one makes of a state: RND and NovelD."""

from __future__ import annotations

from torch import Tensor

from regimen.models.torsos import Observations
from regimen.rewards.base import Reward, Scene
from regimen.rewards.states import features_of
from regimen.rollout import Rollout


class RandomDistillationBonus(Reward):
    """`|| predictor(s) - target(s) ||` of the state that each step led to, `[B, T]` (RND, Burda et al. 2019).

    The plain norm, not its square, as in Henaff et al. (2023). The target is a network with random weights, in no
    `Update`; the predictor is trained on what was visited by `FeatureDistillation(distance="norm")`, so that the bonus
    falls where training has been: a global count for states that cannot be counted. It remembers nothing itself.
    """

    def __init__(
        self,
        target: str = "bonus_target",
        predictor: str = "bonus_predictor",
        name: str = "random_distillation",
    ) -> None:
        """Make the bonus.

        Args:
            target, predictor: members of the cast, states `[R, ...]` to features `[R, D]`.
            name: of the component.
        """
        self.target, self.predictor, self.name = target, predictor, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The bonus of every step."""
        return self.errors(rollout["next_observations"], rollout.mask, scene)

    def errors(self, states: Observations, where: Tensor, scene: Scene) -> Tensor:
        """`[B, T]`, the error on states `[B, T, ...]` at the steps `where`; 0 elsewhere.

        Raises:
            ValueError: the two members' features differ in width, or are not finite.
        """
        owner, visited = f"RandomDistillationBonus '{self.name}'", states[where]
        wanted = features_of(scene.cast, self.target, visited, owner)
        given = features_of(scene.cast, self.predictor, visited, owner)
        if given.shape != wanted.shape:
            raise ValueError(
                f"{owner}: predictor '{self.predictor}' gave features of width {given.shape[1]} and target "
                f"'{self.target}' of width {wanted.shape[1]}, expected equal widths"
            )
        return wanted.new_zeros(where.shape).masked_scatter(where, (given - wanted).norm(dim=1))


class NovelDBonus(Reward):
    """`max(0, RND(s') - alpha RND(s))`: only the step into novelty pays (NovelD, Zhang et al. 2021).

    NovelD's further factor, that a state is new in its episode, is a product:
    `NovelDBonus(rnd) * CountBonus("episodic", form="first")`.
    """

    def __init__(self, rnd: RandomDistillationBonus, alpha: float = 0.1, name: str = "noveld") -> None:
        """Make the bonus.

        Args:
            rnd: whose errors are compared.
            alpha: how much of the error before the step is taken off; 0 gives RND.
            name: of the component.

        Raises:
            ValueError: a negative alpha.
        """
        if not alpha >= 0:
            raise ValueError(f"NovelDBonus: alpha is {alpha}, expected at least 0")
        self.rnd, self.alpha, self.name = rnd, alpha, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The bonus of every step."""
        before = self.rnd.errors(rollout.observations, rollout.mask, scene)
        return (self.rnd.score(rollout, scene) - self.alpha * before).clamp(min=0)
