"""One's own regimen in twenty lines: a reward of ours beside a classifier's, its weight on a schedule."""

import sys

import torch

from regimen import Cast, Knob, ReferenceRefresh, Regimen, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, ReferenceKL
from regimen.rewards import ClassifierReward, reward_from
from regimen.rollout import Rollout
from regimen.tasks.worlds.digits import DigitsWorld


@reward_from
def ink(rollout: Rollout) -> torch.Tensor:  # any function of a rollout: one number per sample, or per step
    return rollout["image"].mean((1, 2, 3))


world = DigitsWorld(seed=0)
pretrain = Stage(
    "pretrain",
    tasks=[world.supervised("pairs", wrong=0.4)],
    steps=int(sys.argv[1]) if len(sys.argv) > 1 else 500,
    updates=[Update(FlowMatchingObjective(), learning_rate=1e-3)],
)
reinforce = Stage(
    "bold digits",
    tasks=[world.generation(group_size=16)],
    steps=60,
    reward=ClassifierReward(world.judge) + 0.5 * ink,
    credit=GroupRelativeAdvantage(clip=5.0),
    updates=[Update(ClippedSurrogateObjective(clip=1e-3) + Knob("kl_weight", 0.01) * ReferenceKL("exact"))],
    rules=[ReferenceRefresh(mode="copy")],
    controllers=[Schedule("weight/ink", Linear(0.5, 0.0, total=60))],
)
outcome = train(Regimen(Cast(policy=world.policy(seed=0)), [pretrain, reinforce]), seed=0)
for record in outcome.evaluations:
    print(record["stage"], {name: round(value, 3) for name, value in record["metrics"].items()})
