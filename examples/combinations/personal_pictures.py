"""VPL's latent reward (arXiv 2408.10075) as the judge of a flow policy: digits for users of hidden tastes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen import Cast, Regimen, Stage, Update
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models.latent_reward import LatentReward, PairEncoder, Pairs
from regimen.models.mlp_denoiser import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, VariationalPreferenceObjective
from regimen.policies import FlowPolicy
from regimen.rewards import ClassifierReward, NormalizedReward, VariationalReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, Evaluation, PromptTask
from regimen.tasks.preferences import preference_rows
from regimen.tasks.worlds.digits import SHAPE, DigitsWorld


def please(judge: str, told: bool, seed: int, s: Settings) -> Regimen:
    """The composition: what a user's pairs say is a latent, which the policy is told and the judge reads."""
    users, cast = Users(seed, s), members(s, told)
    reads = cast[judge].latent  # All numbers of the latent, or none.
    taste = VariationalReward(lambda r: r["image"].flatten(1), lambda r: r["latent"][:, :reads], judge)
    stage = Stage(
        "please",
        [users.asking()],
        s.steps,
        s.batch_size,
        reward=ClassifierReward(users.world.judge) + s.weight * NormalizedReward(taste, name="taste"),
        credit=GroupRelativeAdvantage(std="batch", clip=5.0),
        updates=[Update(ClippedSurrogateObjective(clip=1e-3), ["policy"], learning_rate=s.learning_rate)],
    )
    return Regimen(cast, [stage])


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm; `weight` is that of taste beside the digit asked for."""

    users: int = 2000
    pairs: int = 8
    latent: int = 4
    judge_steps: int = 600
    draw_steps: int = 700
    steps: int = 40
    batch_size: int = 256
    learning_rate: float = 3e-4
    weight: float = 0.3


ACROSS = torch.linspace(-1, 1, 8).expand(8, 8)
TASTES = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), ACROSS, -ACROSS]).flatten(1)
"""`[4, 64]`: much ink, little, on the right, on the left. A user's liking of an image is the product."""


class Users:
    """They have compared real digits, and ask for one. Their tastes are known to the evaluation only."""

    def __init__(self, seed: int, s: Settings) -> None:
        self.s, self.world, self.rng = s, DigitsWorld(seed), torch.Generator().manual_seed(seed)
        self.known, self.new = self.compared(), self.compared()

    def compared(self) -> TensorDict:
        """Rows of `preference_rows`, of users who are others at every call."""
        images, taste = self.world.train.flatten(1), torch.randint(4, (self.s.users,), generator=self.rng)
        first, second = images[torch.randint(len(images), (2, len(taste), self.s.pairs), generator=self.rng)]
        likes_first = ((first - second) @ TASTES[taste][:, :, None]).squeeze(2) > 0
        return preference_rows(first[:, :, None], second[:, :, None], likes_first.float(), taste=taste)

    def asking(self) -> PromptTask:
        """New users, a digit for each; four hundred are for the evaluation."""
        rows = self.new
        asked = {"condition": torch.arange(len(rows)) % 10, "taste": rows["taste"], "pairs": rows["step_columns"]}
        contexts = TensorDict(asked, [len(rows)])
        evaluate = partial(self.pleased, contexts[:400])
        return PromptTask("please", contexts[400:], group_size=16, member="guide", evaluate=evaluate)

    def pleased(self, asked: TensorDict, guide: Guide, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """How often a picture is liked better than real digits of its class, and is taken for that class."""
        images, real = guide.sample(asked, knobs, rng)["image"], self.world.held_out.flatten(1)
        same = self.world.held_out_labels == asked["condition"][:, None]
        taste = TASTES[asked["taste"]]
        ahead = (images.flatten(1) * taste).sum(1, keepdim=True) > taste @ real.T
        right = self.world.evaluator.predict(images) == asked["condition"]
        liked = float(((ahead & same).sum(1) / same.sum(1)).mean())
        return Evaluation({"liked": liked, "accuracy": float(right.float().mean())}, {"images": images[:40]})


class Canvas(nn.Module):
    """What the denoiser reads: the digit, and the latent as a picture to look at."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.paint = nn.Linear(latent, 64, bias=False)

    def forward(self, context: TensorDict) -> dict[str, Tensor]:
        """A number and a picture per sample."""
        return {"condition": context["condition"], "reference": self.paint(context["latent"]).view(-1, *SHAPE)}


class Guide:
    """Draws as the policy does for a user whom the reward infers; a policy that is not told gets zeros."""

    def __init__(self, policy: FlowPolicy, model: LatentReward, told: bool) -> None:
        self.policy, self.model, self.told = policy, model, told

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """A sample for each user, with the column `latent`."""
        latent = self.model.infer(Pairs.of(contexts["pairs"])).mean
        shown = TensorDict({"condition": contexts["condition"], "latent": latent * self.told}, contexts.batch_size)
        return self.policy.sample(shown, knobs, rng).with_columns(latent=latent)


JUDGES = ("personal", "shared")


def members(s: Settings, told: bool = True) -> Cast:
    """A policy, a reward that infers its user, and one for all."""
    policy = FlowPolicy(MLPDenoiser(SHAPE, 10), SHAPE, conditioner=Canvas(s.latent), sampling_steps=8)
    personal = LatentReward(64, PairEncoder(64, s.latent))
    return Cast(policy=policy, personal=personal, shared=LatentReward(64), guide=Guide(policy, personal, told))


def start(seed: int, s: Settings) -> Regimen:
    """Both rewards learn from the same pairs, and the policy to draw."""
    users = Users(seed, s)
    pairs, rise = DatasetTask("pairs", users.known), Schedule("kl_weight", Linear(0.0, 1.0, s.judge_steps // 2))
    both = [Update(VariationalPreferenceObjective(member=m), [m], learning_rate=1e-3, name=m) for m in JUDGES]
    judge = Stage("judge", [pairs], s.judge_steps, 128, updates=both, controllers=[rise])
    labels = users.world.train_labels
    context = TensorDict({"condition": labels, "latent": torch.zeros(len(labels), s.latent)}, [len(labels)])
    digits = DatasetTask("digits", TensorDict({"image": users.world.train, "context": context}, [len(labels)]))
    update = Update(FlowMatchingObjective(), ["policy"], learning_rate=1e-3)
    draw = Stage("draw", [digits], s.draw_steps, 128, updates=[update])
    return Regimen(members(s), [judge, draw], [users.asking()])


def lead(metric: str, other: str, seed: SeedResults) -> float:
    """The combination minus another arm, at the end."""
    return seed["combined"].final[f"please/{metric}"] - seed[other].final[f"please/{metric}"]


PARTS = {"shared": ("one reward for all", "shared", True), "untold": ("policy not told", "personal", False)}
PAPER = Paper(
    slug="personal-pictures",
    title="A latent reward judges a flow policy",
    claim="A flow policy that is told the latent that its judge reads pleases users of opposite tastes.",
    policy="flow",
    arms=[
        Arm("start", "start", start),
        Arm("combined", "latent reward, policy told", partial(please, "personal", True), start="start"),
        *(Arm(n, title, partial(please, judge, told), start="start") for n, (title, judge, told) in PARTS.items()),
    ],
    claims=[
        Claim(f"{m}_{n}", f"{m}: combined minus {title}", partial(lead, m, n), ["combined", n], judged=m == "liked")
        for m in ("liked", "accuracy")
        for n, (title, *_) in PARTS.items()
    ],
    metrics={"please/liked": "liked better than real digits", "please/accuracy": "taken for the digit"},
    scales={"quick": Settings(users=600, judge_steps=30, draw_steps=30, steps=3), "default": Settings()},
)
