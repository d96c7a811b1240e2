"""PPO and GRPO on a language model's tokens: with a reward at every token, the known optimum is learned in seconds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen import Cast, Epochs, Event, Knobs, ReferenceRefresh, Regimen, Stage, Update, train
from regimen.credit import GroupRelativeAdvantage
from regimen.credit.gae import GAE
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.models.value_head import ValueHead
from regimen.objectives import (
    Batch,
    ClippedSurrogateObjective,
    EntropyBonus,
    Objective,
    ReferenceKL,
    ValueObjective,
    grpo,
    ppo,
)
from regimen.policies.token import TokenPolicy
from regimen.rewards import reward_from
from regimen.rollout import Rollout
from regimen.tasks import PromptTask

RING = ["a", "b", "c", "d"]
LENGTH = 6
FIRST = 4  # token of "a"
PROMPTS = TensorDict({"prompt": NonTensorStack(*RING)}, batch_size=[4])


def follows(rollout: Rollout) -> Tensor:
    """`[B, T]`: 1 for a word that comes after the last one in the ring a, b, c, d, a, ... The best sum is LENGTH."""
    before, word = rollout.actions[:, :-1] - FIRST, rollout.actions[:, 1:] - FIRST
    right = (word >= 0) & ((before + 1) % len(RING) == word)
    return torch.cat([torch.zeros(len(rollout), 1), right.float()], 1) * rollout.loss_mask


def cast_of(critic: bool = False) -> Cast:
    tokenizer = word_tokenizer(RING)
    model = small_decoder(len(tokenizer), dim=32, layers=1, heads=2, positions=16)
    policy = TokenPolicy(model, tokenizer, max_new_tokens=LENGTH)
    return Cast(policy=policy, critic=ValueHead(32)) if critic else Cast(policy=policy)


def task(group_size: int = 1) -> PromptTask:
    return PromptTask("ring", PROMPTS, group_size=group_size)


def learned(cast: Cast, stage: Stage) -> list[Mapping[str, float]]:
    """The metrics of every iteration."""
    seen: list[Mapping[str, float]] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            seen.append(event.metrics)

    train(Regimen(cast, [stage]), listener=listen)
    return seen


def greedy(policy: TokenPolicy) -> Rollout:
    """The likeliest answer to every prompt."""
    knobs = {**Knobs.of(policy), "temperature": 0.0}
    return policy.sample(PROMPTS, knobs, torch.Generator())


def must_be_optimal(policy: TokenPolicy) -> None:
    assert follows(greedy(policy)).sum(1).tolist() == [LENGTH] * len(RING)


def ppo_stage(steps: int) -> Stage:
    objective = ppo(entropy_weight=0.01, reads="policy")
    update = Update(objective, ["policy", "critic"], 3e-3, batches=Epochs(epochs=2, minibatches=2))
    return Stage(
        "ppo", [task()], steps, 64, reward=reward_from(follows), credit=GAE(0.95, reads="policy"), updates=[update]
    )


def test_ppo_learns_the_optimum_and_its_values() -> None:
    cast = cast_of(critic=True)
    metrics = learned(cast, ppo_stage(40))
    assert metrics[0]["reward/total"] < 1
    must_be_optimal(cast["policy"])
    # Every token to come earns 1.
    rollout = greedy(cast["policy"])
    rollout = rollout.replace(knobs={"temperature": torch.ones(4)})
    values = cast["critic"](cast["policy"].distribution(rollout).hidden.detach())[rollout.loss_mask].view(-1, LENGTH)
    torch.testing.assert_close(values, torch.arange(LENGTH, 0.0, -1).expand(4, -1), atol=0.75, rtol=0)


def test_grpo_learns_the_optimum() -> None:
    cast = cast_of()
    update = Update(grpo(kl_weight=0.01), learning_rate=5e-3, batches=Epochs(epochs=1, minibatches=2))
    credit, rules = GroupRelativeAdvantage(), [ReferenceRefresh()]
    stage = Stage("grpo", [task(8)], 70, 64, reward=reward_from(follows), credit=credit, updates=[update], rules=rules)
    metrics = learned(cast, stage)
    assert metrics[0]["reward/total"] < 1
    must_be_optimal(cast["policy"])


def test_same_seed_same_numbers() -> None:
    assert learned(cast_of(critic=True), ppo_stage(3)) == learned(cast_of(critic=True), ppo_stage(3))


@pytest.fixture
def judged() -> tuple[Cast, Rollout]:
    """A cast and a rollout of its own."""
    cast = cast_of(critic=True)
    policy = cast["policy"]
    rollout = policy.sample(PROMPTS.repeat_interleave(2), Knobs.of(policy), torch.Generator().manual_seed(0))
    return cast, rollout.replace(reward=follows(rollout), group=torch.arange(8) // 2)


def test_a_tokens_reward_is_credited_to_it_and_to_those_before(judged: tuple[Cast, Rollout]) -> None:
    """The head starts at 0, so Monte-Carlo advantages are the rewards to come."""
    cast, rollout = judged
    credited = GAE(1.0, normalize=None, reads="policy")(rollout, {}, cast)
    to_come = rollout.reward.flip(1).cumsum(1).flip(1) * rollout.loss_mask
    assert torch.equal(credited.advantages, to_come)
    assert (credited.advantages.amax(1) > 0).any()


def test_group_relative_credit_sums_a_samples_tokens(judged: tuple[Cast, Rollout]) -> None:
    cast, rollout = judged
    by_token = GroupRelativeAdvantage()(rollout, {}, cast)
    by_sample = GroupRelativeAdvantage()(rollout.replace(reward=rollout.reward.sum(1)), {}, cast)
    assert torch.equal(by_token.advantages, by_sample.advantages)


def test_no_ratio_is_off_before_the_first_update(judged: tuple[Cast, Rollout]) -> None:
    cast, rollout = judged
    objective = ppo(reads="policy")
    loss = objective(batch_of(objective, GAE(reads="policy")(rollout, {}, cast), cast))
    assert float(loss.metrics["ratio_deviation"]) < 1e-5


def batch_of(objective: Objective, rollout: Rollout, cast: Cast) -> Batch:
    return Batch(rollout, cast, Knobs.of(objective), torch.Generator())


def test_shorthands_are_sums_of_their_parts(judged: tuple[Cast, Rollout]) -> None:
    cast, rollout = judged
    cast.fork("policy", "reference")
    torch.nn.init.normal_(cast["reference"].network.model.lm_head.weight)
    rollout = GAE(reads="policy")(rollout, {}, cast)
    rollout = rollout.replace(logprobs=rollout.logprobs + 0.3)
    for short, long in [
        (
            ppo(0.1, value_weight=0.7, value_clip=0.1, entropy_weight=0.3, reads="policy"),
            ClippedSurrogateObjective(0.1, aggregate="token") + 0.7 * ValueObjective(0.1, reads="policy")
            - 0.3 * EntropyBonus(),
        ),
        (
            grpo(0.1, 0.2, kl_weight=0.3, aggregate="constant", horizon=9),
            ClippedSurrogateObjective(0.1, 0.2, "constant", 9) + 0.3 * ReferenceKL("k3", "constant", 9),
        ),
    ]:  # fmt: skip
        found, expected = short(batch_of(short, rollout, cast)), long(batch_of(long, rollout, cast))
        assert torch.equal(found.total, expected.total)
        assert found.components == expected.components
        assert float(found.total.detach()) != 0


def test_grpo_without_kl_needs_no_reference(judged: tuple[Cast, Rollout]) -> None:
    cast, rollout = judged
    rollout = GroupRelativeAdvantage()(rollout, {}, cast)
    assert set(grpo(kl_weight=0)(batch_of(grpo(kl_weight=0), rollout, cast)).components) == {"surrogate"}
    with pytest.raises(ValueError, match="needs the member 'reference'"):
        grpo()(batch_of(grpo(), rollout, cast))


def test_knobs_of_the_shorthands_have_the_fields_names() -> None:
    assert {knob.name for knob in grpo().knobs} == {"weight/surrogate", "kl_weight"}
    assert {knob.name for knob in ppo().knobs} == {"weight/surrogate", "value_weight", "entropy_weight"}
