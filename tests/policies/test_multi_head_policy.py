"""A language model with a head for each objective: which head scores, which samples, and what one of them alone is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

import tiny_language_models as tiny
from regimen.cast import Cast, ReferenceRefresh
from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage, PairsPerObjective
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.models import CausalLM
from regimen.objectives import Batch, ClippedSurrogateObjective, DPOObjective
from regimen.objectives.dpo import record_logprobs
from regimen.policies import MultiHeadPolicy, TokenPolicy
from regimen.progress import Event
from regimen.regimen import Regimen, Stage
from regimen.rewards import FunctionReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, PromptTask
from regimen.update import Update

NAMES = ("first", "second")
PROMPTS = ["the cat", "a", "say yes or no. the hat"]


def policy(
    names: tuple[str, ...] = NAMES, kind: str = "llama", apart: bool = True, noise: float = 0.0
) -> MultiHeadPolicy:
    """Heads that differ, if they should."""
    found = MultiHeadPolicy(
        tiny.language_model(kind),
        tiny.tokenizer(),
        names,
        max_new_tokens=6,
        evaluation_temperature=1.0,
        head_noise=noise,
    )
    if apart:
        with torch.no_grad():
            for place, head in enumerate(found.output.heads):
                drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(place))
                head.weight.add_(0.3 * drawn)
    return found


def sample(policy: TokenPolicy, times: int = 3, seed: int = 0, **knobs: float) -> Rollout:
    prompts = PROMPTS * times
    contexts = TensorDict({"prompt": NonTensorStack(*prompts)}, batch_size=[len(prompts)])
    values = {name.replace("_", "/", 1) if name.startswith("head") else name: value for name, value in knobs.items()}
    return policy.sample(contexts, Knobs.of(policy, **values), torch.Generator().manual_seed(seed))


def pairs_of(policy: TokenPolicy) -> Rollout:
    """Pairs of two objectives: many tokens, and few."""
    rollout = sample(policy, times=4).replace(group=torch.arange(12) % 3)
    length = rollout.loss_mask.sum(1).float() + torch.arange(12) / 100
    return PairsPerObjective(NAMES)(rollout.replace(rewards={"first": length, "second": -length}), {}, {})


@pytest.mark.parametrize("kind", tiny.CLASSES)
def test_a_sample_is_scored_as_it_was_sampled(kind: str) -> None:
    """Under the weights in force then; on classes with tied embeddings and without."""
    found = policy(kind=kind)
    for weights in ((1.0, 1.0), (0.3, 0.9), (0.0, 2.0)):
        rollout = sample(found, head_first=weights[0], head_second=weights[1])
        again = found.distribution(rollout).logprob.detach()
        assert torch.allclose(again[rollout.loss_mask], rollout.logprobs[rollout.loss_mask], atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_start_alike_are_the_model(tied: bool) -> None:
    model = tiny.language_model("llama", tie_word_embeddings=tied)
    plain = TokenPolicy(copy.deepcopy(model), tiny.tokenizer(), max_new_tokens=6)
    many = MultiHeadPolicy(model, tiny.tokenizer(), NAMES, max_new_tokens=6)
    rollout = sample(plain)
    assert torch.allclose(many.distribution(rollout).logprob, plain.distribution(rollout).logprob, atol=1e-5)
    assert torch.equal(sample(many).actions, rollout.actions)
    embeddings = many.network.base.get_input_embeddings().weight
    assert all(head.weight is not embeddings for head in many.output.heads)
    assert many.network.base.config.tie_word_embeddings is False


def test_one_head_alone_is_a_model_with_that_head() -> None:
    found = policy()
    for place, name in enumerate(NAMES):
        alone = TokenPolicy(found.merged({name: 3.0}), tiny.tokenizer(), max_new_tokens=6)
        weights = {f"head_{other}": float(other == name) for other in NAMES}
        rollout = sample(found, **weights)
        assert torch.equal(sample(alone).actions, rollout.actions)
        tagged = rollout.with_columns(objective=torch.full((len(rollout),), place))
        assert torch.allclose(found.distribution(tagged).logprob, alone.distribution(rollout).logprob, atol=1e-5)


def test_merged_models_are_saved_and_loaded(tmp_path: Path) -> None:
    found = policy()
    merged = found.merged({"first": 0.25, "second": 0.75})
    tiny.save(tmp_path, merged.model, tiny.tokenizer())
    loaded = TokenPolicy.from_pretrained(tmp_path, max_new_tokens=6)
    rollout = sample(found, head_first=1.0, head_second=3.0)
    assert torch.allclose(
        loaded.distribution(rollout).logprob[rollout.loss_mask], rollout.logprobs[rollout.loss_mask], atol=1e-4
    )
    with pytest.raises(NotImplementedError, match=r"merged\(weights\)\.model\.save_pretrained"):
        found.save_pretrained(tmp_path)


def test_other_heads_get_no_gradient() -> None:
    found = policy()
    rollout = sample(found).with_columns(objective=torch.ones(9, dtype=torch.int64))
    found.distribution(rollout).logprob.sum().backward()
    assert found.output.heads[0].weight.grad is None
    assert float(found.output.heads[1].weight.grad.abs().sum()) > 0
    assert float(found.network.base.get_input_embeddings().weight.grad.abs().sum()) > 0


def test_hidden_states_are_the_model_s() -> None:
    found = policy()
    rollout = sample(found)
    assert found.distribution(rollout).hidden.shape == (9, rollout.steps, 16)


def loss_of(policy: TokenPolicy, pairs: Rollout, reference: TokenPolicy, **settings: object) -> Tensor:
    objective = DPOObjective(0.1, **settings)  # type: ignore[arg-type]
    return objective(Batch(pairs, {"policy": policy, "reference": reference}, {}, torch.Generator())).total


def test_one_head_is_ordinary_dpo() -> None:
    plain = TokenPolicy(tiny.language_model("llama"), tiny.tokenizer(), max_new_tokens=6)
    reference = TokenPolicy(tiny.language_model("llama"), tiny.tokenizer(), max_new_tokens=6)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    one = MultiHeadPolicy(copy.deepcopy(plain.network.model), tiny.tokenizer(), ["all"], max_new_tokens=6)
    pairs = pairs_of(reference)
    zero = torch.zeros(len(pairs), dtype=torch.int64)
    nested = pairs["rejected"].copy().set("columns", TensorDict({"objective": zero}, batch_size=[len(pairs)]))
    pairs = pairs.with_columns(objective=zero, rejected=nested)
    ours = loss_of(one, pairs, reference, group_by="objective")
    theirs = loss_of(plain, pairs, reference)
    assert torch.allclose(ours, theirs, atol=1e-6)
    body = one.network.base.base_model.layers[0].mlp.up_proj.weight
    other = plain.network.base.base_model.layers[0].mlp.up_proj.weight
    ours.backward(), theirs.backward()
    assert torch.allclose(body.grad, other.grad, atol=1e-6)


def test_without_noise_every_margin_is_zero_at_the_start() -> None:
    found = policy(apart=False)
    pairs = pairs_of(found)
    drawn = loss_of(found, pairs, found, recorded="logprobs", group_by="objective")
    assert float(drawn.detach()) == pytest.approx(0.693147, abs=1e-5)


def test_a_reference_must_carry_the_same_noise() -> None:
    plain, noisy = policy(apart=False), policy(apart=False, noise=0.1)
    pairs = pairs_of(plain)
    same = loss_of(noisy, pairs, noisy.reference(), group_by="objective")
    other = loss_of(noisy, pairs, plain, group_by="objective")
    assert float(same.detach()) == pytest.approx(0.693147, abs=1e-6)
    assert abs(float(other.detach()) - 0.693147) > 1e-4


def test_recorded_logprobs_are_those_of_the_pair_s_head() -> None:
    found = policy()
    pairs = pairs_of(found)
    table = pairs.columns.select("objective", "rejected").clone()
    for name in ("actions", "mask", "loss_mask"):
        table.set(name, getattr(pairs, name))
    recorded = record_logprobs(table, found)
    rows = DatasetTask("pairs", recorded, order="sequential")
    drawn = rows.collect({}, Knobs.of(found), torch.Generator(), len(pairs))
    assert float(loss_of(found, drawn, found, recorded="reference").detach()) == pytest.approx(0.693147, abs=1e-5)


def test_an_objective_without_a_head_is_an_error() -> None:
    found = policy()
    rollout = sample(found)
    for bad in (torch.full((9,), 2), torch.full((9,), -1), torch.zeros(9)):
        with pytest.raises(ValueError, match=r"expected whole numbers from 0 to 1, for the heads first, second"):
            found.distribution(rollout.with_columns(objective=bad))
    with pytest.raises(ValueError, match=r"one above 0"):
        sample(found, head_first=0.0, head_second=0.0)
    with pytest.raises(ValueError, match=r"there is no head 'third'"):
        found.merged({"third": 1.0})
    del (knobs := rollout.knobs.copy())["head/second"]
    with pytest.raises(ValueError, match=r"without the knob 'head/second'"):
        found.distribution(rollout.replace(knobs=knobs))


def test_it_passes_the_checker_of_policies() -> None:
    found = policy()
    assert check(found, rollout=sample(found)).messages == []


def test_reinforcement_trains_the_mixture_that_sampled() -> None:
    """Group-relative reinforcement under the weights in force: the ratio starts at 1, and both heads move."""
    found = policy()
    rows = TensorDict({"prompt": NonTensorStack(*PROMPTS)}, batch_size=[3])
    longer = FunctionReward(lambda rollout: rollout.loss_mask.sum(1).float(), "longer")
    stage = Stage(
        "reinforce", [PromptTask("ask", rows, group_size=4)], 2, 24, reward=longer, credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective())], knobs={"head/first": 0.5, "head/second": 1.5},
    )  # fmt: skip
    before = [head.weight.detach().clone() for head in found.output.heads]
    told: list[Event] = []
    train(Regimen(Cast(policy=found), [stage]), seed=0, listener=told.append)
    steps = [event for event in told if event.kind == "step"]
    assert all(event.metrics["policy/ratio_deviation"] < 1e-4 for event in steps)
    assert all(not torch.equal(a, b.weight) for a, b in zip(before, found.output.heads, strict=True))


def test_every_head_starts_from_a_model_with_one() -> None:
    single = TokenPolicy(tiny.language_model("llama"), tiny.tokenizer(), max_new_tokens=6)
    with torch.no_grad():
        single.network.base.get_input_embeddings().weight.mul_(2)
    cast = Cast(policy=single, aligned=policy())
    cast.start("aligned", of="policy")
    weight = single.network.base.get_output_embeddings().weight
    assert all(torch.equal(head.weight, weight) for head in cast["aligned"].output.heads)
    rollout = sample(single)
    assert torch.equal(cast["aligned"].distribution(rollout).logprob, single.distribution(rollout).logprob)


def test_adapters_are_trained_with_the_heads(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny.save(tmp_path, tiny.language_model("qwen2"), tiny.tokenizer())
    found = MultiHeadPolicy.from_pretrained(tmp_path, NAMES, lora_rank=2, max_new_tokens=6)
    assert isinstance(found.network, CausalLM)
    assert found.network.has_adapters
    trained = {name.split(".")[-2] for name, p in found.named_parameters() if p.requires_grad}
    assert {"0", "1", "default"} <= trained
    cast = Cast(policy=found)
    ReferenceRefresh(mode="fixed").start(cast)
    pairs = pairs_of(found)
    loss = DPOObjective(group_by="objective")(Batch(pairs, cast, {}, torch.Generator())).total
    assert float(loss.detach()) == pytest.approx(0.693147, abs=1e-5)
    loss.backward()
    assert all(head.weight.grad is not None for head in found.output.heads)
    merged = found.merged({"first": 1.0})
    assert merged.has_adapters
