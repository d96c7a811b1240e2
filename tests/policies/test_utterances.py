"""Two levels of a dialogue: turns as steps, their tokens, and policies and critics that read them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Draws, Knobs, ReferenceRefresh, Regimen, ReplayMemory, Stage, Update, train
from regimen.checkers import check
from regimen.credit import GAE, CriticAdvantage
from regimen.models.causal_lm import CausalLM
from regimen.models.double_critic import DoubleCritic
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.models.text_torso import PooledTextTorso, TextTorso
from regimen.models.value_network import ValueNetwork
from regimen.objectives import Batch, DoubleCriticObjective, ReinforceObjective, Resampled, ValueObjective, iql
from regimen.policies.token import TokenPolicy
from regimen.policies.utterances import UtterancePolicy, as_token_steps, utterance_steps
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import DialogueTask, OneByOne, UtteranceTask
from regimen.tasks.worlds.guess_number import GuessNumber
from tiny_language_models import language_model, tokenizer

GAME = GuessNumber()


def tiny(kind: str = "llama", **options: Any) -> TokenPolicy:
    words = word_tokenizer(GAME.words)
    options = {"max_new_tokens": 3, **options}
    if kind == "llama":
        return TokenPolicy(small_decoder(len(words), dim=16, layers=2, heads=2, positions=64), words, **options)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return TokenPolicy(
        GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=64, n_embd=16, n_layer=2, n_head=2)),
        words, **options,
    )  # fmt: skip


def game(**options: Any) -> DialogueTask:
    return DialogueTask("guess", OneByOne(GAME), max_turns=3, discount=0.95, facts=("valid",), **options)


def collected(policy: TokenPolicy, task: Any, size: int = 6, **knobs: float) -> Rollout:
    return task.collect({"policy": policy}, Knobs.of(policy, task, **knobs), torch.Generator().manual_seed(0), size)


def texts(table: TensorDict, row: int, step: int) -> list[int]:
    return table["tokens"][row, step][table["mask"][row, step]].tolist()


# From tokens to turns


def by_hand() -> Rollout:
    """A dialogue of two turns of two tokens, heard 1 2 and 5, and one of one turn of one token, heard 1."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 8, 0, 0, 0, 0, 0]])
    own = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]]).bool()
    segment = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0] * 7])
    discount = torch.tensor([[1, 1, 1, 0.95, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]])
    paid = torch.tensor([[0, 0, 0, -1.0, 0, 0, -2.0], [0, 3.0, 9, 9, 9, 9, 9]])
    return Rollout.create(
        task="talk", group=torch.arange(2), mask=mask, loss_mask=own, actions=tokens, segment=segment,
        discount=discount, logprobs=-tokens.float() * own, knobs={"temperature": 2.0},
        step_columns={"env_reward": paid},
    )  # fmt: skip


def test_turns_are_steps() -> None:
    steps = utterance_steps(by_hand(), context=4, utterance=2)
    assert steps.mask.tolist() == steps.loss_mask.tolist() == [[True, True], [True, False]]
    assert [texts(steps.observations, *place) for place in ((0, 0), (0, 1), (1, 0))] == [[1, 2], [2, 3, 4, 5], [1]]
    assert [texts(steps.actions, *place) for place in ((0, 0), (0, 1), (1, 0))] == [[3, 4], [6, 7], [8]]
    after = steps["next_observations"]
    assert [texts(after, *place) for place in ((0, 0), (0, 1), (1, 0))] == [[2, 3, 4, 5], [2, 3, 4, 5], [1]]
    assert steps["env_reward"].tolist() == [[-1, -2], [3, 0]]
    assert torch.allclose(steps.discount[steps.mask], torch.tensor([0.95, 0, 0]))
    assert steps.logprobs.tolist() == [[-7, -13], [-8, 0]]
    assert steps.knobs["temperature"].tolist() == [2, 2]
    assert steps.task_names == ("talk",)


def test_returns_of_turns_are_those_of_the_dialogue() -> None:
    """Rewards -1, -1, 0 under a discount of 0.95: -1.95, -1, 0."""
    tokens, place = torch.arange(1, 7)[None], torch.arange(6)
    paid = torch.tensor([[0, -1.0, 0, -1.0, 0, 0]])
    rollout = Rollout.create(
        task="talk", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 6).bool(),
        loss_mask=(place % 2 == 1)[None], actions=tokens, segment=(place // 2)[None],
        discount=torch.tensor([[1, 0.95, 1, 0.95, 1, 0]]), step_columns={"env_reward": paid},
    ).replace(reward=paid)  # fmt: skip
    steps = utterance_steps(rollout, 8, 1)
    zero = {"critic": lambda rollout: torch.zeros(rollout.mask.shape)}
    credited = GAE(1.0, normalize=None)(steps, {}, zero)
    assert torch.allclose(credited.advantages, torch.tensor([[-1.95, -1.0, 0.0]]))


def test_the_newest_words_of_a_long_history_are_kept() -> None:
    steps = utterance_steps(by_hand(), context=2, utterance=2)
    assert texts(steps.observations, 0, 1) == [4, 5]


def test_back_to_tokens() -> None:
    steps = utterance_steps(by_hand(), context=8, utterance=2).replace(advantages=torch.tensor([[1.0, 2], [3, 4]]))
    tokens = as_token_steps(steps)
    assert tokens.actions.tolist() == [[1, 2, 3, 4, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7], [1, 8, 0, 0, 0, 0, 0]]
    assert tokens.lengths.tolist() == [4, 7, 2]
    assert tokens.advantages.tolist() == [[0, 0, 1, 1, 0, 0, 0], [0] * 5 + [2, 2], [0, 3, 0, 0, 0, 0, 0]]
    assert tokens.logprobs[1].tolist() == [0] * 5 + [-6, -7]
    assert tokens.knobs["temperature"].tolist() == [2, 2, 2]


def test_what_cannot_be_cut_into_turns_is_refused() -> None:
    rollout = by_hand()
    with pytest.raises(ValueError, match="an utterance has 2 tokens, expected at most 1; give utterances more room"):
        utterance_steps(rollout, 4, 1)
    with pytest.raises(ValueError, match="dialogue 0 was cut off after turn 1 and might have gone on .discount 0.95."):
        utterance_steps(rollout.replace(discount=torch.where(rollout.discount == 0, 0.95, rollout.discount)), 4, 2)
    with pytest.raises(ValueError, match="expected at least 1 of each, samples of a DialogueTask, and no top_k"):
        utterance_steps(rollout.with_step_columns(kept=rollout.actions), 4, 2)
    with pytest.raises(ValueError, match="context=0, utterance=2"):
        utterance_steps(rollout, 0, 2)


# A policy of utterances


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_utterances_are_scored_as_they_were_sampled(kind: str, temperature: float) -> None:
    policy = tiny(kind)
    steps = collected(policy, UtteranceTask(game(), context=40), temperature=temperature)
    speaker = UtterancePolicy(policy)
    assert torch.allclose(speaker.logprob(steps), steps.logprobs, atol=1e-4)
    fresh = speaker.resample(steps, Knobs.of(policy), torch.Generator().manual_seed(1))
    assert torch.allclose(speaker.logprob(fresh), fresh.logprobs, atol=1e-4)
    assert fresh.knobs["temperature"].tolist() == [1.0] * 6
    assert not torch.equal(fresh.actions["tokens"], steps.actions["tokens"])
    assert torch.equal(fresh.observations["tokens"], steps.observations["tokens"])
    assert torch.allclose(as_token_steps(fresh).logprobs, policy.logprob(as_token_steps(fresh)), atol=1e-4)


def test_the_gradient_is_that_of_the_sum_over_tokens() -> None:
    """Without a baseline, A = -0.1 and log-probabilities -1 and -2 give a loss of -0.3."""

    class Fixed:
        def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Any:
            return type("Steps", (), {"logprob": rollout.logprobs})

    steps = utterance_steps(by_hand(), 8, 2)[1:2]
    steps = steps.replace(advantages=torch.tensor([[-0.1, 0]]), logprobs=torch.tensor([[-3.0, 0]])).with_step_columns(
        token_logprobs=torch.tensor([[[-1.0, -2.0], [0, 0]]])
    )
    said = torch.tensor([[[1, 1], [0, 0]]]).bool()
    steps = steps.replace(actions=TensorDict({**steps.actions, "mask": said}, [1, 2]))
    upper = ReinforceObjective("token")(Batch(steps, {"policy": Fixed()}, {}, torch.Generator())).total
    tokens = as_token_steps(steps)
    lower = ReinforceObjective("constant", 1)
    assert upper.item() == pytest.approx(-0.3)
    assert lower(Batch(tokens, {"policy": Fixed()}, {}, torch.Generator())).total.item() == pytest.approx(-0.3)
    # With a baseline of 0.2 and -0.3 for the tokens, 0.1; and the baseline's own loss is 0.065.
    baseline = torch.zeros(tokens.mask.shape)
    baseline[tokens.loss_mask] = torch.tensor([0.2, -0.3])
    less = tokens.replace(advantages=tokens.advantages - baseline)
    assert lower(Batch(less, {"policy": Fixed()}, {}, torch.Generator())).total.item() == pytest.approx(0.1)
    fitted = tokens.with_step_columns(value_target=tokens.advantages)
    value = ValueObjective()(Batch(fitted, {"critic": lambda rollout: baseline}, {}, torch.Generator())).total
    assert value.item() == pytest.approx(0.065)


def test_likeliest_and_truncated_utterances_are_refused() -> None:
    policy = tiny()
    steps = collected(policy, UtteranceTask(game(), context=40))
    for knob, value in {"temperature": 0.0, "top_k": 3, "top_p": 0.5}.items():
        with pytest.raises(ValueError, match="expected above 0, 0 and 1"):
            UtterancePolicy(policy).resample(steps, Knobs.of(policy, **{knob: value}), torch.Generator())


# Critics that read


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_torso_reads_each_text_as_if_it_were_alone(kind: str) -> None:
    torso = TextTorso(tiny(kind).network)
    tokens, mask = torch.tensor([[4, 5, 6, 0], [4, 5, 6, 7], [4, 0, 0, 0]]), torch.tensor([3, 4, 1])
    table = TensorDict({"tokens": tokens, "mask": torch.arange(4) < mask[:, None]}, [3])
    alone = torch.stack([torso.network.hidden(tokens[row : row + 1, :n])[0, -1] for row, n in enumerate(mask.tolist())])
    assert torch.allclose(torso(table), alone, atol=1e-5)
    with pytest.raises(ValueError, match="empty action or state: text 1 of 2 has no tokens"):
        torso(TensorDict({"tokens": tokens[:2], "mask": torch.tensor([[1] * 4, [0] * 4]).bool()}, [2]))


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=40, pad_token_id=0, **sizes)).eval()


def test_an_encoder_of_another_vocabulary_reads_the_end_of_a_long_text() -> None:
    words = word_tokenizer(GAME.words)
    torso = PooledTextTorso(roberta(), tokenizer(), words, longest=12)
    rows = [words("guess from 1 to 7 3 higher", add_special_tokens=False)["input_ids"], words("3 higher")["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    found = torso(TensorDict({"tokens": tokens, "mask": mask}, [2]))
    assert found.shape == (2, torso.width)
    ids = tokenizer()("guess from 1 to 7 3 higher")["input_ids"]
    assert len(ids) > 12
    alone = torso.encoder(input_ids=torch.tensor([ids[-12:]])).pooler_output
    assert torch.allclose(found[:1], alone, atol=1e-5)


# Through the loop


def learning(policy: TokenPolicy, torso: Any, **verbs: Any) -> Regimen:
    """ArCHer's two updates on guessing games."""
    follow = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.9)
    evaluate = Update(DoubleCriticObjective(policy="speaker"), ["critic"], 1e-3, batches=Draws(2, 8), rules=[follow])
    loss = Resampled(ReinforceObjective("token", member="speaker"), CriticAdvantage(), "speaker")
    improve = Update(loss, ["policy"], 1e-3, batches=Draws(1, 8), micro_batch=4)
    stage = Stage(
        "archer", [UtteranceTask(game(evaluation=range(4)), context=40)], 2, 6, EnvironmentReward(),
        updates=[evaluate, improve], memory=partial(ReplayMemory, 50, "transition"), **verbs,
    )  # fmt: skip
    cast = Cast(policy=policy, critic=DoubleCritic(torso, torso, 8), speaker=UtterancePolicy(policy))
    return Regimen(cast, [stage])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_levels_are_learned_side_by_side(kind: str) -> None:
    policy = tiny(kind)
    torso = TextTorso(CausalLM(tiny(kind).network.base))
    before = policy.network.base.state_dict()["lm_head.weight"].clone()
    outcome = train(learning(policy, torso), listener=lambda event: None)
    assert outcome.counters.drawn == 2 * 3 * 8
    assert outcome.counters.samples == 12
    assert not torch.equal(before, policy.network.base.state_dict()["lm_head.weight"])
    assert set(outcome.cast.state_dict()["members"]) == {"policy", "critic", "critic_target"}


def test_the_real_classes_fit() -> None:
    """GPT-2 as the policy and RoBERTa as the critic's encoder, tiny."""
    model, words = language_model("gpt2"), tokenizer()
    policy = TokenPolicy(model, words, max_new_tokens=3)
    torso = PooledTextTorso(roberta(), words, words, longest=30)
    outcome = train(learning(policy, torso), listener=lambda event: None)
    assert outcome.counters.gradient_steps == 6


def test_implicit_q_learning_of_utterances() -> None:
    """Other papers' parts on the upper level: the offline variant, which asks for no new utterances."""
    policy = tiny()
    torso = TextTorso(CausalLM(tiny().network.base))
    speaker: Any = UtterancePolicy(policy)
    cast = Cast(policy=policy, speaker=speaker, critic=DoubleCritic(torso, torso, 8), value=ValueNetwork(torso))
    objective = iql()
    for _, term in objective.terms:
        if hasattr(term, "policy") and term.name == "advantage_weighted":
            object.__setattr__(term, "policy", "speaker")
    stage = Stage(
        "iql", [UtteranceTask(game(evaluation=()), context=40)], 1, 6, EnvironmentReward(),
        updates=[Update(objective, ["value", "policy", "critic"], 1e-3, batches=Draws(2, 8))],
        memory=partial(ReplayMemory, 50, "transition"),
        rules=[ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.9)],
    )  # fmt: skip
    outcome = train(Regimen(cast, [stage]), listener=lambda event: None)
    assert (outcome.counters.gradient_steps, outcome.counters.drawn) == (2, 0)


def test_passes_the_checkers() -> None:
    policy = tiny()
    task = UtteranceTask(game(group_size=2, starts=range(10, 20), evaluation=range(7)), context=40)
    assert check(task, cast={"policy": policy}).ok
