"""GRPO end to end: 128 completions of 64 tokens in groups of 8, judged, credited, and one gradient step.

Both sides: the same decoder and weights, prompts of 16 to 24 tokens, temperature 1, the clipped surrogate with
clip 0.2 and the mean per completion, no KL, group-normalised advantages, AdamW at 1e-4 without decay, gradient norm 1,
metrics of every step; no checkpoints, no logs on disk. No completion can end early (see `language.tokenizer`).
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Job, Measurement
from benchmarks.language import NEW_TOKENS, SIZES, Size, Watch, decoder, even_words, prompts, tokenizer
from regimen import Cast, Regimen, Stage, Update, train
from regimen.credit import GroupRelativeAdvantage
from regimen.loop import Event
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import TokenPolicy
from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout
from regimen.tasks.text import TextPromptTask

ROWS, GROUP = 128, 8
LEARNING_RATE = 1e-4
WARM_UP = 1


class EvenWords(Reward):
    """`even_words` of every answer."""

    name = "even_words"

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """`[B]`."""
        return torch.tensor([even_words(text) for text in rollout["text"].tolist()])


def regimen(size: Size, seed: int, steps: int) -> Regimen:
    """The stage."""
    policy = TokenPolicy(decoder(size, seed), tokenizer(size), max_new_tokens=NEW_TOKENS)
    rows = [{"prompt": prompt} for prompt in prompts(steps * ROWS // GROUP, size, seed)]
    task = TextPromptTask("words", rows, "{prompt}", group_size=GROUP, order="sequential")
    update = Update(ClippedSurrogateObjective(clip=0.2), learning_rate=LEARNING_RATE, options={"weight_decay": 0.0})
    stage = Stage(
        "grpo", [task], steps, ROWS, reward=1.0 * EvenWords(), credit=GroupRelativeAdvantage(), updates=[update]
    )
    return Regimen(Cast(policy=policy), [stage])


def ours(name: str, steps: int, seed: int) -> Measurement:
    """Completion tokens per second of `train`."""
    watch, seen = Watch(WARM_UP), list[dict[str, float]]()

    def listen(event: Event) -> None:
        if event.kind == "step":
            seen.append(dict(event.metrics))
            watch.step()

    train(regimen(SIZES[name], seed, WARM_UP + steps), seed=seed, listener=listen)
    results = {"reward": seen[-1]["reward/total"], "grad_norm": seen[0]["policy/grad_norm"]}
    return Measurement(watch.measured * ROWS * NEW_TOKENS / watch.wall, results, {"wall": watch.wall, "cpu": watch.cpu})


def trainer(size: Size, seed: int, steps: int, callback: Any) -> Any:
    """TRL's, with the settings of `regimen`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    warnings.filterwarnings("ignore")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), seed=seed, max_steps=steps, per_device_train_batch_size=ROWS,
        num_generations=GROUP, max_completion_length=NEW_TOKENS, beta=0.0, epsilon=0.2, loss_type="grpo",
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", shuffle_dataset=False, use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    words = tokenizer(size)
    rows = Dataset.from_dict({"prompt": prompts(steps * ROWS // GROUP, size, seed)})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [even_words(text) for text in completions]

    return GRPOTrainer(decoder(size, seed), reward, config, rows, processing_class=words, callbacks=[callback])


def theirs(name: str, steps: int, seed: int) -> Measurement:
    """Completion tokens per second of TRL's GRPOTrainer."""
    from transformers import TrainerCallback

    watch = Watch(WARM_UP)

    class Watching(TrainerCallback):
        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            watch.step()

    work = trainer(SIZES[name], seed, WARM_UP + steps, Watching())
    work.train()
    logs = [entry for entry in work.state.log_history if "reward" in entry]
    assert all(entry["completions/mean_length"] == NEW_TOKENS for entry in logs)
    results = {"reward": logs[-1]["reward"], "grad_norm": logs[0]["grad_norm"]}
    return Measurement(watch.measured * ROWS * NEW_TOKENS / watch.wall, results, {"wall": watch.wall, "cpu": watch.cpu})


BOUND = (
    "Sampling, see there, and the forward and backward pass, which reads a group's prompt once: matrix products for "
    "the most part at 7M (by oneDNN, at twice the speed of MKL on this processor), and dispatch at 0.15M."
)

JOBS = [
    Job(
        f"grpo-{name}",
        "completion tokens/s",
        partial(ours, name, steps),
        partial(theirs, name, steps),
        "TRL GRPOTrainer",
        target,
        bound=BOUND,
    )
    for name, steps, target in [("0.15M", 6, 2.0), ("1M", 3, 2.0), ("7M", 1, 1.5)]
]
