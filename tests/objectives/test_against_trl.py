"""TRL's trainers and ours on the same batch: equal losses and equal gradients.

Every number of theirs comes out of TRL: a `GRPOTrainer` is given completions, rewards and old log-probabilities, a
`DPOTrainer` and an `SFTTrainer` are given texts. TRL 1.16 against Regimen:

    GRPOConfig                                Regimen
    loss_type="grpo"                          aggregate="sequence"
    loss_type="dapo", "bnpo"                  aggregate="token" ("bnpo" per micro-batch, so only without accumulation)
    loss_type="dr_grpo"                       aggregate="constant", horizon=max_completion_length
    epsilon, epsilon_high                     clip, clip_high
    beta, use_bias_correction_kl              kl_weight * ReferenceKL("k3", importance_weighted=...)
    entropy_coef                              - entropy_coef * EntropyBonus()
    temperature                               the knob temperature
    scale_rewards="group", "batch", "none"    GroupRelativeAdvantage(std="group"), "batch", None
    mask_truncated_completions                loss_mask & ~truncated, after credit

    DPOConfig                                 Regimen
    loss_type="sigmoid", "hinge", "robust"    DPOObjective(beta, variant)
    loss_type="sigmoid_norm", "ipo"           DPOObjective(beta, "sigmoid" or "ipo", length_normalize=True)
    loss_type="aot" of one pair               DPOObjective(beta, "sigmoid", label_smoothing)
    loss_type=["sigmoid", "sft"]              DPOObjective(beta) + weight * SFTObjective()

    SFTConfig                                 Regimen
    loss_type="nll", completion only          SFTObjective()
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.credit.group_relative import GroupRelativeAdvantage
from regimen.knobs import Knobs
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.objectives import (
    Batch,
    ClippedSurrogateObjective,
    DPOObjective,
    EntropyBonus,
    Objective,
    ReferenceKL,
    SFTObjective,
    grpo,
)
from regimen.objectives.dpo import rejected_rollout
from regimen.policies.decoding import Completions
from regimen.policies.sequences import Sequences
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

WORDS = [f"w{number}" for number in range(12)]
LONGEST = 7
KNOBS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": LONGEST}
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "sequence"},
    "bnpo": {"aggregate": "token"},
    "dapo": {"aggregate": "token"},
    "dr_grpo": {"aggregate": "constant", "horizon": LONGEST},
}
STDS: dict[str, Any] = {"group": "group", "batch": "batch", "none": None}


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL, which takes seconds to import, so not at the top."""
    import trl

    return trl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS)


@dataclass(frozen=True)
class Result:
    """A loss and its gradients, by parameter."""

    loss: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, loss: Tensor, model: nn.Module) -> Result:
        """Take the gradients."""
        model.zero_grad()
        loss.backward()
        return cls(loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()})  # type: ignore[union-attr]

    def must_be(self, other: Result) -> None:
        """Equal to 1e-6, and not because there is nothing."""
        assert self.gradients.keys() == other.gradients.keys()
        assert max(float(gradient.abs().max()) for gradient in other.gradients.values()) > 1e-3
        equal(self.loss, other.loss)
        for name, gradient in self.gradients.items():
            equal(gradient, other.gradients[name])


def equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def decoder(tokenizer: Any, seed: int) -> Any:
    model = small_decoder(len(tokenizer), dim=16, layers=2, heads=2, positions=32, seed=seed)
    # Weights as large as `transformers` makes them: at 1e-6 single precision leaves no room for larger gradients.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.02 * 16**0.5
    return model


class Pair:
    """A policy and a reference with other weights, for us and for TRL."""

    def __init__(self, tokenizer: Any) -> None:
        self.model, self.reference = decoder(tokenizer, 0), decoder(tokenizer, 1).requires_grad_(False)
        self.policy = TokenPolicy(self.model, tokenizer)
        self.cast = {"policy": self.policy, "reference": TokenPolicy(self.reference, tokenizer)}

    def ours(self, objective: Objective, *rollouts: Rollout, whole: Rollout | None = None) -> Result:
        """The loss of the rollouts, which are the micro-batches of the minibatch `whole`."""
        knobs, start, losses = Knobs.of(objective), 0, []
        for rollout in rollouts:
            rows = slice(start, start := start + len(rollout))
            losses.append(objective(Batch(rollout, self.cast, knobs, torch.Generator(), whole, rows)).total)
        return Result.of(torch.stack(losses).sum(), self.model)


def settings_of(folder: Path, batch_size: int) -> dict[str, Any]:
    """A trainer's settings for a processor, in full precision, that writes and reports nothing."""
    return {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "per_device_train_batch_size": batch_size,
    }  # fmt: skip


# GRPO


@dataclass(frozen=True)
class Answers:
    """Three answers to each of three prompts, of various lengths, with rewards; two were cut off.

    The last group's rewards are equal.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: tuple[float, ...] = (1.0, 0.0, 0.5, 2.0, 2.0, 0.0, 0.7, 0.7, 0.7)
    end = 2

    @classmethod
    def make(cls) -> Answers:
        rng = torch.Generator().manual_seed(3)
        prompts = [torch.randint(4, 16, (length,), generator=rng).tolist() for length in (2, 4, 3)]
        lengths, cut = (1, 3, 7, 5, 2, 6, 4, 7, 3), (3, 7)
        words = [torch.randint(4, 16, (length,), generator=rng).tolist() for length in lengths]
        completions = [answer if row in cut else [*answer[:-1], cls.end] for row, answer in enumerate(words)]
        return cls([prompt for prompt in prompts for _ in range(3)], completions)

    @property
    def mask(self) -> Tensor:
        """Bool `[B, LONGEST]`."""
        return torch.arange(LONGEST) < torch.tensor([len(answer) for answer in self.completions])[:, None]

    def rollout(self, policy: TokenPolicy, **knobs: float) -> Rollout:
        """As it would have been sampled by a policy some steps ago."""
        mask, starts = self.mask, [torch.tensor(prompt) for prompt in self.prompts]
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        tokens[mask] = torch.tensor([token for answer in self.completions for token in answer])
        ended = torch.tensor([answer[-1] == self.end for answer in self.completions])
        answers = Completions(tokens, mask, torch.zeros(mask.shape), None, ended)
        rollout = Rollout.create(
            task="t", group=torch.arange(9) // 3, reward=torch.tensor(self.rewards), knobs={**KNOBS, **knobs},
            columns={"truncated": ~ended}, **Sequences.of(starts, [starts[0][:0]] * 9, answers).fields(scored=True),
        )  # fmt: skip
        drift = 0.3 * torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(4))
        return rollout.replace(logprobs=(policy.logprob(rollout).detach() + drift) * rollout.loss_mask)

    def trainer(self, trl: Any, folder: Path, pair: Pair, batch_size: int = 9, **settings: Any) -> Any:
        """TRL's trainer, which is handed these answers as if a model had written them."""
        from datasets import Dataset

        pair.reference.save_pretrained(folder / "reference")
        model = copy.deepcopy(pair.model)
        model.config._name_or_path = str(folder / "reference")
        mask = settings.pop("env_mask", None)
        written = {"prompt_ids": self.prompts, "completion_ids": self.completions, "logprobs": None}
        return trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: list(self.rewards),
            args=trl.GRPOConfig(
                num_generations=3, max_completion_length=LONGEST, **settings_of(folder, batch_size), **settings
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w0"] * 9}),
            processing_class=pair.policy.tokenizer,
            rollout_func=lambda prompts, trainer: written | ({} if mask is None else {"env_mask": mask}),
        )

    def scored(self, trainer: Any, rollout: Rollout) -> dict[str, Tensor]:
        """What TRL learns from: its advantages, masks and reference log-probabilities, with the old ones of ours."""
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        inputs: dict[str, Tensor] = trainer._generate_and_score_completions([{"prompt": "w0"}] * 9)
        old = torch.zeros(self.mask.shape).masked_scatter(self.mask, rollout.logprobs[rollout.loss_mask])
        return {**inputs, "old_per_token_logps": old}

    def theirs(self, trainer: Any, rollout: Rollout) -> Result:
        """TRL's loss."""
        return Result.of(trainer.compute_loss(trainer.model, self.scored(trainer, rollout)), trainer.model)


Both = Callable[..., tuple[Result, Result]]


@pytest.fixture
def both(trl: Any, tokenizer: Any, tmp_path: Path) -> Both:
    """`both(objective, std="group", edit=..., **settings of TRL)`: our result and TRL's.

    `edit` changes our rollout after credit.
    """

    def run(
        objective: Objective,
        std: Any = "group",
        edit: Callable[[Rollout], Rollout] = lambda rollout: rollout,
        **settings: Any,
    ) -> tuple[Result, Result]:
        pair, answers = Pair(tokenizer), Answers.make()
        rollout = answers.rollout(pair.policy, temperature=settings.get("temperature", 1.0))
        credited = edit(GroupRelativeAdvantage(std)(rollout, {}, {}))
        trainer = answers.trainer(trl, tmp_path, pair, **settings)
        return pair.ours(objective, credited), answers.theirs(trainer, rollout)

    return run


@pytest.mark.parametrize("scale_rewards", STDS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo_with_every_aggregate_and_scaling(both: Both, loss_type: str, scale_rewards: str) -> None:
    """With clip-higher and a KL to a reference."""
    objective = grpo(0.1, 0.25, kl_weight=0.3, **LOSSES[loss_type])
    ours, theirs = both(
        objective, STDS[scale_rewards], loss_type=loss_type, scale_rewards=scale_rewards, epsilon=0.1,
        epsilon_high=0.25, beta=0.3, use_bias_correction_kl=False,
    )  # fmt: skip
    ours.must_be(theirs)


def test_defaults_of_trl(both: Both) -> None:
    ours, theirs = both(ClippedSurrogateObjective(aggregate="token"))
    ours.must_be(theirs)


def test_kl_with_importance_weights(both: Both) -> None:
    """TRL's default where there is a KL."""
    kl = ReferenceKL("k3", "token", importance_weighted=True)
    ours, theirs = both(ClippedSurrogateObjective(aggregate="token") + 0.3 * kl, beta=0.3)
    ours.must_be(theirs)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_entropy_bonus(both: Both, loss_type: str) -> None:
    objective = ClippedSurrogateObjective(**LOSSES[loss_type]) - 0.2 * EntropyBonus()
    ours, theirs = both(objective, loss_type=loss_type, entropy_coef=0.2)
    ours.must_be(theirs)


def test_temperature(both: Both) -> None:
    ours, theirs = both(
        grpo(kl_weight=0.3) - 0.2 * EntropyBonus(), temperature=0.7, loss_type="grpo", beta=0.3, entropy_coef=0.2,
        use_bias_correction_kl=False,
    )  # fmt: skip
    ours.must_be(theirs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_foreign_tokens(both: Both, loss_type: str) -> None:
    """Tokens that an environment wrote inside an answer are read and not learned from."""
    foreign = [[0 if 1 <= place <= 2 else 1 for place in range(len(answer))] for answer in Answers.make().completions]

    def without(rollout: Rollout) -> Rollout:
        own = rollout.loss_mask.clone()
        own[rollout.loss_mask] = torch.tensor([bool(kept) for row in foreign for kept in row])
        return rollout.replace(loss_mask=own)

    objective = grpo(kl_weight=0.3, **LOSSES[loss_type])
    ours, theirs = both(
        objective, edit=without, loss_type=loss_type, beta=0.3, use_bias_correction_kl=False, env_mask=foreign
    )
    ours.must_be(theirs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_answers_that_were_cut_off_can_be_left_out(both: Both, loss_type: str) -> None:
    """They still count for their group's mean. With "grpo", TRL's mean over samples counts them as zeros; ours does
    not count them."""

    def without(rollout: Rollout) -> Rollout:
        return rollout.replace(loss_mask=rollout.loss_mask & ~rollout["truncated"][:, None])

    objective = grpo(kl_weight=0, **LOSSES[loss_type])
    share = 7 / 9 if loss_type == "grpo" else 1
    ours, theirs = both(share * objective, edit=without, loss_type=loss_type, mask_truncated_completions=True)
    ours.must_be(theirs)


def test_sample_without_a_reward_leaves_its_groups_mean(trl: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL keeps it in the loss's averages with advantage 0; here it leaves the loss."""
    pair, answers = Pair(tokenizer), Answers.make()
    rollout = answers.rollout(pair.policy)
    judged = torch.arange(9) != 3
    credited = GroupRelativeAdvantage()(rollout.replace(loss_mask=rollout.loss_mask & judged[:, None]), {}, {})
    trainer = answers.trainer(trl, tmp_path, pair)
    rewards = [reward if keep else None for reward, keep in zip(answers.rewards, judged, strict=True)]
    trainer.reward_funcs = [lambda completions, **_: rewards]
    theirs = answers.scored(trainer, rollout)["advantages"]
    equal(credited.advantages.sum(1) / credited.loss_mask.sum(1).clamp(min=1), theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulated_gradients(trl: Any, tokenizer: Any, tmp_path: Path, loss_type: str) -> None:
    """Three micro-batches here and there."""
    pair, answers = Pair(tokenizer), Answers.make()
    rollout = answers.rollout(pair.policy)
    credited = GroupRelativeAdvantage()(rollout, {}, {})
    trainer = answers.trainer(
        trl, tmp_path, pair, batch_size=3, gradient_accumulation_steps=3, loss_type=loss_type, beta=0.3,
        use_bias_correction_kl=False,
    )  # fmt: skip
    inputs = answers.scored(trainer, rollout)
    parts = [slice(start, start + 3) for start in (0, 3, 6)]
    losses = [
        trainer.compute_loss(trainer.model, {k: v[rows] if v.ndim else v for k, v in inputs.items()}) for rows in parts
    ]
    objective = grpo(kl_weight=0.3, **LOSSES[loss_type])
    ours = pair.ours(objective, *(credited[rows] for rows in parts), whole=credited)
    ours.must_be(Result.of(torch.stack(losses).sum(), trainer.model))


# DPO and supervised fine-tuning

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
CHOSEN = ["w1", "w2 w3 w4 w5", "w6 w7", "w8 w9 w10"]
REJECTED = ["w3 w3 w3", "w4", "w5 w11", "w0 w0 w0 w0 w0"]


def after(texts: list[str]) -> list[str]:
    return [f" {text}" for text in texts]


def pairs_of(policy: TokenPolicy, count: int) -> Rollout:
    rows = policy.demonstrations(PROMPTS[:count], CHOSEN[:count])
    rows["rejected"] = policy.demonstrations(PROMPTS[:count], REJECTED[:count])
    return DatasetTask("pairs", rows, order="sequential").collect({}, KNOBS, torch.Generator(), count)


def dpo_trainer(trl: Any, folder: Path, pair: Pair, count: int, **settings: Any) -> Any:
    from datasets import Dataset

    texts = {"prompt": PROMPTS, "chosen": after(CHOSEN), "rejected": after(REJECTED)}
    trainer = trl.DPOTrainer(
        copy.deepcopy(pair.model),
        ref_model=copy.deepcopy(pair.reference),
        args=trl.DPOConfig(**settings_of(folder, count), **settings),
        train_dataset=Dataset.from_dict({name: column[:count] for name, column in texts.items()}),
        processing_class=pair.policy.tokenizer,
    )
    trainer.model.train()
    return trainer


def collated(trainer: Any) -> Any:
    return trainer.data_collator(list(trainer.train_dataset))


@pytest.mark.parametrize(("settings", "objective"), [
    ({"loss_type": "sigmoid"}, DPOObjective(0.4)),
    ({"loss_type": "sigmoid_norm"}, DPOObjective(0.4, length_normalize=True)),
    ({"loss_type": "hinge"}, DPOObjective(0.4, "hinge")),
    ({"loss_type": "ipo"}, DPOObjective(0.4, "ipo", length_normalize=True)),
    ({"loss_type": "robust", "label_smoothing": 0.2}, DPOObjective(0.4, "robust", label_smoothing=0.2)),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, DPOObjective(0.4) + 0.5 * SFTObjective()),
], ids=lambda value: str(value["loss_type"]) if isinstance(value, dict) else "")  # fmt: skip
def test_dpo(trl: Any, tokenizer: Any, tmp_path: Path, settings: dict[str, Any], objective: Objective) -> None:
    pair = Pair(tokenizer)
    trainer = dpo_trainer(trl, tmp_path, pair, 4, beta=0.4, **settings)
    theirs = Result.of(trainer.compute_loss(trainer.model, collated(trainer)), trainer.model)
    pair.ours(objective, pairs_of(pair.policy, 4)).must_be(theirs)


def test_dpo_with_label_smoothing(trl: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL smooths the logistic loss only in "aot", which sorts the batch first: nothing, for a single pair."""
    pair = Pair(tokenizer)
    trainer = dpo_trainer(trl, tmp_path, pair, 1, beta=0.4, loss_type="aot", label_smoothing=0.2)
    theirs = Result.of(trainer.compute_loss(trainer.model, collated(trainer)), trainer.model)
    pair.ours(DPOObjective(0.4, label_smoothing=0.2), pairs_of(pair.policy, 1)).must_be(theirs)


def test_dpo_with_recorded_log_probabilities_of_the_reference(trl: Any, tokenizer: Any, tmp_path: Path) -> None:
    pair = Pair(tokenizer)
    trainer = dpo_trainer(trl, tmp_path, pair, 4, beta=0.4, precompute_ref_log_probs=True)
    theirs = Result.of(trainer.compute_loss(trainer.model, collated(trainer)), trainer.model)
    pairs, reference = pairs_of(pair.policy, 4), pair.cast.pop("reference")
    chosen, rejected = (side.with_columns(seen=reference.logprob(side)) for side in (pairs, rejected_rollout(pairs)))
    recorded = chosen.with_columns(rejected=rejected.data)
    pair.ours(DPOObjective(0.4, recorded="seen"), recorded).must_be(theirs)


@pytest.fixture
def supervised(trl: Any, tokenizer: Any, tmp_path: Path) -> tuple[Pair, Rollout, Any, dict[str, Tensor]]:
    """Models, our rollout, TRL's trainer and its batch."""
    from datasets import Dataset

    pair = Pair(tokenizer)
    trainer = trl.SFTTrainer(
        copy.deepcopy(pair.model),
        args=trl.SFTConfig(loss_type="nll", **settings_of(tmp_path, 4)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "completion": after(CHOSEN)}),
        processing_class=tokenizer,
    )
    trainer.model.train()
    rows = pair.policy.demonstrations(PROMPTS, CHOSEN)
    rollout = DatasetTask("texts", rows, order="sequential").collect({}, KNOBS, torch.Generator(), 4)
    return pair, rollout, trainer, collated(trainer)


Supervised = tuple[Pair, Rollout, Any, dict[str, Any]]


def test_sft(supervised: Supervised) -> None:
    pair, rollout, trainer, batch = supervised
    theirs = Result.of(trainer.compute_loss(trainer.model, dict(batch)), trainer.model)
    pair.ours(SFTObjective("token"), rollout).must_be(theirs)


def test_sft_is_the_loss_of_transformers(supervised: Supervised) -> None:
    pair, rollout, _, batch = supervised
    model = copy.deepcopy(pair.model)
    pair.ours(SFTObjective("token"), rollout).must_be(Result.of(model(**batch).loss, model))


def test_sft_with_accumulated_gradients(supervised: Supervised) -> None:
    pair, rollout, trainer, batch = supervised
    parts = [slice(0, 1), slice(1, 4)]
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = partial(trainer.compute_loss, trainer.model, num_items_in_batch=count)
    losses = [loss({name: value[rows] for name, value in batch.items()}) for rows in parts]
    ours = pair.ours(SFTObjective("token"), *(rollout[rows] for rows in parts), whole=rollout)
    ours.must_be(Result.of(torch.stack(losses).sum(), trainer.model))
