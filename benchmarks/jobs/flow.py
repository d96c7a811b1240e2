"""Flow sampling and one GRPO update, beside the network calls that any implementation of them must make.

Both sides: the denoiser of the paper `unipic2` at its default scale, 512 samples in groups of 16 that edit a reference
image, 10 denoising steps, and one gradient of the 9 steps that are learned from. Ours is an iteration of `train`: the
stochastic sampler, the rollout, a reward, group-relative credit, the clipped surrogate, the gradient's norm, AdamW's
step, metrics and health. The bare side is 10 forward passes of 512 rows without gradients, one forward pass of 4608
rows, and its backward pass.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.harness import Job, Measurement
from regimen import Cast, Event, Regimen, Rollout, Stage, Update, train
from regimen.credit import GroupRelativeAdvantage
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import FlowPolicy
from regimen.rewards import FunctionReward
from regimen.tasks import PromptTask
from regimen.tasks.worlds.digits import CONDITIONS, SHAPE

SAMPLES, GROUP, STEPS, WARM_UP, ITERATIONS = 512, 16, 10, 3, 15


def prompts(seed: int) -> TensorDict:
    """A condition and a reference image for each of 512 prompts."""
    rng = torch.Generator().manual_seed(seed)
    rows = {
        "condition": torch.randint(CONDITIONS, (SAMPLES,), generator=rng),
        "reference": torch.randn(SAMPLES, *SHAPE, generator=rng),
        "has_reference": torch.ones(SAMPLES, dtype=torch.bool),
    }
    return TensorDict(rows, batch_size=[SAMPLES])


class Watch:
    """Seconds of the parts of each turn, from one mark to the next; the first turns are not counted."""

    def __init__(self) -> None:
        self._turn, self._last = 0, 0.0
        self.parts: defaultdict[str, float] = defaultdict(float)

    def mark(self, part: str) -> None:
        """What was done since the last mark."""
        now = time.perf_counter()
        if self._turn >= WARM_UP:
            self.parts[part] += now - self._last
        self._last = now

    def turn(self) -> None:
        """The next one begins."""
        self._turn += 1

    def measurement(self) -> Measurement:
        """Samples per second, and the seconds of a turn's parts."""
        seconds = sum(self.parts.values())
        return Measurement(SAMPLES * ITERATIONS / seconds, {}, {k: v / ITERATIONS for k, v in self.parts.items()})


def ours(seed: int) -> Measurement:
    """`train`, timed from within: the reward is asked once all is collected, and a step is told once it is learned."""
    watch = Watch()

    def bright(rollout: Rollout) -> Tensor:
        watch.mark("collect")
        return rollout["image"].flatten(1).mean(1)

    class Credit(GroupRelativeAdvantage):
        def __call__(self, *judged: object) -> Rollout:
            rollout = super().__call__(*judged)  # type: ignore[arg-type]
            watch.mark("judge, credit")
            return rollout

    def listen(event: Event) -> None:
        if event.kind == "step":
            watch.mark("learn")
            watch.turn()

    torch.manual_seed(seed)
    policy = FlowPolicy(MLPDenoiser(SHAPE, CONDITIONS), SHAPE, sampling_steps=STEPS)
    stage = Stage(
        "flow",
        [PromptTask("edit", prompts(seed), group_size=GROUP)],
        WARM_UP + ITERATIONS,
        SAMPLES,
        reward=FunctionReward(bright, "bright"),
        credit=Credit(std="batch", ddof=0, clip=5.0),
        updates=[Update(ClippedSurrogateObjective(clip=1e-3), options={"weight_decay": 1e-4})],
    )
    train(Regimen(Cast(policy=policy), [stage]), seed=seed, listener=listen)
    return watch.measurement()


def bare(seed: int) -> Measurement:
    """The network calls."""
    watch = Watch()
    torch.manual_seed(seed)
    denoiser, contexts = MLPDenoiser(SHAPE, CONDITIONS), prompts(seed)
    x, sigma = torch.randn(SAMPLES, *SHAPE), torch.full((SAMPLES,), 0.5)
    learned = [tensor.repeat_interleave(STEPS - 1, 0) for tensor in (x, sigma)]
    learned_contexts = contexts.repeat_interleave(STEPS - 1, 0)
    for _ in range(WARM_UP + ITERATIONS):
        watch.mark("between")
        with torch.no_grad():
            for _ in range(STEPS):
                denoiser(x, sigma, contexts)
        watch.mark("collect")
        denoiser.zero_grad()
        denoiser(*learned, learned_contexts).square().mean().backward()
        watch.mark("learn")
        watch.turn()
    return watch.measurement()


JOBS = [
    Job(
        "flow",
        "samples/s",
        ours,
        bare,
        "bare network calls",
        target=0.8,
        bound="Matrix products: 72 % of the processor time of ours, 75 % of the peer's. What ours adds (noise, the "
        "recorded states, log-densities and their gradient, AdamW) is 6 to 10 %. Splitting the batch makes neither "
        "faster.",
    )
]
