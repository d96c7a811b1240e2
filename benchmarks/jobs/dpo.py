"""DPO on 64 pairs a step, prompts of 16 to 24 tokens and answers of 65, the reference's log-probabilities cached.

Both sides: the same decoder, weights and pairs in the same order, beta 0.1, AdamW at 1e-4 without decay, gradient
norm 1, metrics of every step; caching is over before the clock starts. Losses and gradient norms are compared. TRL adds
the end of the text to every answer, so ours has it too.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from typing import Any

from benchmarks.harness import Job, Measurement
from benchmarks.language import NEW_TOKENS, SIZES, Watch, decoder, ending_tokenizer, prompts
from regimen import Cast, Regimen, Stage, Update, train
from regimen.loop import Event
from regimen.objectives.dpo import DPOObjective, record_logprobs
from regimen.policies import TokenPolicy
from regimen.tasks import DatasetTask

PAIRS = 64
LEARNING_RATE = 1e-4
WARM_UP = 1


def texts(size: Any, count: int, seed: int) -> dict[str, list[str]]:
    """Prompts, and two answers of 64 words to each."""
    words = " ".join(prompts(2 * count * 6, size, seed + 1)).split()
    answers = [" ".join(words[i : i + NEW_TOKENS]) for i in range(0, 2 * count * NEW_TOKENS, NEW_TOKENS)]
    return {"prompt": prompts(count, size, seed), "chosen": answers[:count], "rejected": answers[count:]}


def ours(name: str, steps: int, seed: int) -> Measurement:
    """Pairs per second of `train`."""
    size, total = SIZES[name], WARM_UP + steps
    policy, pairs = TokenPolicy(decoder(size, seed), ending_tokenizer(size)), texts(size, total * PAIRS, seed)
    rows, rejected = (policy.demonstrations(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected"))
    rows = record_logprobs(rows.set("rejected", rejected), policy)
    update = Update(DPOObjective(0.1, recorded="reference"), learning_rate=LEARNING_RATE, options={"weight_decay": 0.0})
    stage = Stage("dpo", [DatasetTask("pairs", rows, order="sequential")], total, PAIRS, updates=[update])
    watch, losses, norms = Watch(WARM_UP), list[float](), list[float]()

    def listen(event: Event) -> None:
        if event.kind == "step":
            losses.append(event.metrics["policy/loss"])
            norms.append(event.metrics["policy/grad_norm"])
            watch.step()

    train(Regimen(Cast(policy=policy), [stage]), seed=seed, listener=listen)
    return _measured(watch, losses, norms)


def theirs(name: str, steps: int, seed: int) -> Measurement:
    """Pairs per second of TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    warnings.filterwarnings("ignore")
    size, total = SIZES[name], WARM_UP + steps
    watch = Watch(WARM_UP)

    class Watching(TrainerCallback):
        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            watch.step()

    class Sequential(DPOTrainer):
        def _get_train_sampler(self, *_args: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

    pairs = texts(size, total * PAIRS, seed)
    # An answer continues its prompt with a space between.
    pairs = {key: [f" {text}" if key != "prompt" else text for text in found] for key, found in pairs.items()}
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), seed=seed, max_steps=total, per_device_train_batch_size=PAIRS, beta=0.1,
        precompute_ref_log_probs=True, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", use_cpu=True,
        bf16=False, gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    work = Sequential(
        decoder(size, seed), args=config, train_dataset=Dataset.from_dict(pairs),
        processing_class=ending_tokenizer(size), callbacks=[Watching()],
    )  # fmt: skip
    work.train()
    logs = [entry for entry in work.state.log_history if "loss" in entry]
    return _measured(watch, *([float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")))


def _measured(watch: Watch, losses: list[float], norms: list[float]) -> Measurement:
    results = {f"loss_{step}": loss for step, loss in enumerate(losses)} | {"grad_norm": norms[-1]}
    return Measurement(watch.measured * PAIRS / watch.wall, results, {"wall": watch.wall, "cpu": watch.cpu})


JOBS = [
    Job(
        "dpo-1M",
        "pairs/s",
        partial(ours, "1M", 5),
        partial(theirs, "1M", 5),
        "TRL DPOTrainer",
        1.5,
        tolerance=1e-5,
        bound="Matrix products, which are by oneDNN and at twice the speed of MKL on this processor.",
    )
]
