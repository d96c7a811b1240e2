"""Language models as policies, on tiny models of four classes that went through a folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor, nn

import tiny_language_models as tiny
from regimen.cast import Cast, ReferenceRefresh
from regimen.checkers import check
from regimen.credit import GAE, GroupRelativeAdvantage
from regimen.functions.categorical import support_size
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.models import small_decoder, word_tokenizer
from regimen.models.value_head import ValueHead
from regimen.objectives import Batch, ClippedSurrogateObjective, ReferenceKL, SFTObjective, ValueObjective
from regimen.policies import TokenPolicy, token_steps
from regimen.regimen import Regimen, Stage
from regimen.rewards import FunctionReward
from regimen.rollout import Rollout
from regimen.storage import load_tree
from regimen.tasks import DatasetTask, PromptTask
from regimen.update import Update

SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "both": {"temperature": 1.3, "top_k": 7, "top_p": 0.9},
}
PROMPTS = ["the cat", "say yes or no. the hat", "a"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(kind)`: a model and its tokenizer on disk."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.save(tmp_path_factory.mktemp(kind), tiny.language_model(kind), tiny.tokenizer())
        return made[kind]

    return of


@pytest.fixture(params=tiny.CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(folder: Callable[[str], Path], kind: str) -> TokenPolicy:
    return TokenPolicy.from_pretrained(folder(kind), max_new_tokens=10, stop=["e", "a"])


def ask(prompts: Sequence[str], **entries: Any) -> TensorDict:
    return TensorDict({"prompt": NonTensorStack(*prompts), **entries}, batch_size=[len(prompts)])


def sample(policy: TokenPolicy, prompts: Sequence[str] = PROMPTS * 4, seed: int = 0, **knobs: float) -> Rollout:
    return policy.sample(ask(prompts), Knobs.of(policy, **knobs), torch.Generator().manual_seed(seed))


def word_policy(words: str = "a b c d", **settings: Any) -> TokenPolicy:
    tokenizer = word_tokenizer(words.split())
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=32)
    return TokenPolicy(model, tokenizer, **settings)


def full_logits(policy: TokenPolicy, tokens: Tensor, **inputs: Any) -> Tensor:
    """The model's own logits `[T, V]` of one sequence; the logits of step t stand at t - 1."""
    with torch.no_grad():
        logits: Tensor = policy.network.base(tokens[None], **inputs).logits[0]
    return logits


def direct_logprob(policy: TokenPolicy, tokens: Tensor, **inputs: Any) -> Tensor:
    """`[T - 1]`: log-probability of every token but the first."""
    return full_logits(policy, tokens, **inputs).log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).squeeze(-1)


# Samples


@pytest.mark.parametrize("setting", SETTINGS)
def test_before_any_update_the_ratio_is_one(policy: TokenPolicy, setting: str) -> None:
    rollout = sample(policy, **SETTINGS[setting])
    own = rollout.loss_mask
    ratio = (policy.logprob(rollout) - rollout.logprobs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert rollout.logprobs[own].std() > 0.1
    assert rollout.logprobs[~own].abs().max() == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_recorded_logprobs_are_those_of_the_truncated_distribution(policy: TokenPolicy, setting: str) -> None:
    rollout = sample(policy, **SETTINGS[setting])
    knobs = Knobs.of(policy, **SETTINGS[setting])
    for row in range(len(PROMPTS)):
        length = int(rollout.lengths[row])
        tokens = rollout.actions[row, :length]
        logits = full_logits(policy, tokens)[:-1] / knobs["temperature"]
        kept = support_size(logits, int(knobs["top_k"]), knobs["top_p"])
        place = (logits > logits.gather(-1, tokens[1:, None])).sum(-1)
        rank = logits.argsort(-1, descending=True).argsort(-1)
        inside = logits.masked_fill(rank >= kept[:, None], -torch.inf).log_softmax(-1)
        expected = inside.gather(-1, tokens[1:, None]).squeeze(-1)
        own = rollout.loss_mask[row, 1:length]
        torch.testing.assert_close(rollout.logprobs[row, 1:length][own], expected[own], rtol=1e-5, atol=1e-5)
        assert bool((place < kept)[own].all())


def test_a_sample_is_prompt_then_answer_with_padding_at_the_end(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    for row, prompt in enumerate(PROMPTS):
        start, length = policy.encode(prompt), int(rollout.lengths[row])
        assert rollout.actions[row, : len(start)].tolist() == start.tolist()
        assert rollout.mask[row].tolist() == [True] * length + [False] * (rollout.steps - length)
        own = [False] * len(start) + [True] * (length - len(start)) + [False] * (rollout.steps - length)
        assert rollout.loss_mask[row].tolist() == own
        answer = rollout.actions[row, len(start) : length]
        assert rollout["text"][row] == policy.tokenizer.decode(answer, skip_special_tokens=True)


def test_the_sampling_parameters_are_recorded(policy: TokenPolicy) -> None:
    rollout = sample(policy, temperature=0.7, top_k=3, max_new_tokens=4)
    assert {name: float(rollout.knobs[name][0]) for name in sorted(rollout.knobs.keys())} == pytest.approx(
        {"max_new_tokens": 4, "temperature": 0.7, "top_k": 3, "top_p": 1}
    )
    assert set(rollout["kept"][rollout.loss_mask].tolist()) == {3}


def test_greedy_answers_are_those_of_generate(policy: TokenPolicy) -> None:
    rollout = sample(policy, PROMPTS, temperature=0.0)
    assert rollout.logprobs is None
    for row, prompt in enumerate(PROMPTS):
        ids = policy.encode(prompt)[None]
        theirs = policy.network.base.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, tokenizer=policy.tokenizer,
            stop_strings=policy.stop.texts,
        )[0]  # fmt: skip
        assert rollout.actions[row, : int(rollout.lengths[row])].tolist() == theirs.tolist()


def test_temperature_is_zero_in_evaluation(policy: TokenPolicy) -> None:
    knobs = Knobs.of(policy, temperature=1.5).for_evaluation()
    assert knobs["temperature"] == 0


def test_truncated_says_which_answers_hit_the_length_limit(policy: TokenPolicy) -> None:
    rollout = sample(policy, PROMPTS * 8, max_new_tokens=3)
    own = rollout.loss_mask.sum(1)
    assert own.max() == 3
    assert 0 < rollout["truncated"].sum() < len(rollout)
    for row in range(len(rollout)):
        answer = rollout.actions[row][rollout.loss_mask[row]]
        text = policy.tokenizer.decode(answer)
        stopped = int(answer[-1]) == policy.tokenizer.eos_token_id or any(stop in text for stop in policy.stop.texts)
        assert bool(rollout["truncated"][row]) == (not stopped)
        assert int(own[row]) == 3 or stopped


def test_a_forced_prefix_is_in_the_text_and_not_in_the_loss(policy: TokenPolicy) -> None:
    prefixes = ["<answer> 4", "", "the"]
    contexts = ask(PROMPTS, prefix=NonTensorStack(*prefixes))
    rollout = policy.sample(contexts, Knobs.of(policy), torch.Generator().manual_seed(0))
    for row, (prompt, prefix) in enumerate(zip(PROMPTS, prefixes, strict=True)):
        start, forced = policy.encode(prompt), policy.encode_answer(prefix)
        given = len(start) + len(forced)
        assert rollout["text"][row].startswith(prefix)
        assert rollout.actions[row, :given].tolist() == [*start.tolist(), *forced.tolist()]
        assert not rollout.loss_mask[row, :given].any()
        assert rollout.loss_mask[row, given]
    torch.testing.assert_close(policy.logprob(rollout).detach(), rollout.logprobs, rtol=0, atol=1e-5)


def test_sampling_leaves_the_global_generator_alone_and_repeats(policy: TokenPolicy) -> None:
    state = torch.get_rng_state()
    first, again = sample(policy), sample(policy)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, sample(policy, seed=1).actions)


def test_training_mode_does_not_turn_dropout_on(folder: Callable[[str], Path]) -> None:
    policy = TokenPolicy.from_pretrained(folder("gpt2"), max_new_tokens=8)
    assert policy.network.base.config.resid_pdrop > 0
    rollout = sample(policy)
    policy.train()
    torch.testing.assert_close(policy.logprob(rollout).detach(), rollout.logprobs, rtol=0, atol=1e-5)


def test_a_policy_passes_the_checker(policy: TokenPolicy) -> None:
    result = check(policy, rollout=sample(policy, PROMPTS * 2))
    assert result.ok, str(result)
    assert check(policy).ok


# Prompts


def test_chat_prompts_are_the_tokenizers_template(folder: Callable[[str], Path]) -> None:
    policy = TokenPolicy.from_pretrained(folder("qwen2"), chat=True, system="be brief")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    theirs = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert policy.encode("the cat").tolist() == theirs
    assert policy.encode("the cat")[0] == policy.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_chat_samples_are_scored_as_they_were_drawn(folder: Callable[[str], Path]) -> None:
    policy = TokenPolicy.from_pretrained(folder("qwen2"), chat=True, max_new_tokens=6)
    rollout = sample(policy)
    torch.testing.assert_close(policy.logprob(rollout).detach(), rollout.logprobs, rtol=0, atol=1e-5)


def test_all_end_tokens_of_the_models_settings_end_an_answer(folder: Callable[[str], Path], tmp_path: Path) -> None:
    policy = TokenPolicy.from_pretrained(folder("qwen2"))
    end, other = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    policy.network.base.generation_config.eos_token_id = [end, other]
    policy.save_pretrained(tmp_path)
    again = TokenPolicy.from_pretrained(tmp_path)
    assert again.stop(torch.tensor([[end], [other], [5]]), 1).tolist() == [True, True, False]
    assert policy.stop(torch.tensor([[end], [other], [5]]), 1).tolist() == [True, False, False]


@pytest.mark.parametrize(("settings", "message"), [
    ({"chat": True}, "no chat_template.*set one, or chat=False"),
    ({"system": "be brief"}, "only a chat template has a place for; set chat=True"),
])  # fmt: skip
def test_settings_that_the_tokenizer_cannot_serve_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_policy(**settings)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = word_tokenizer(["a"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        TokenPolicy(small_decoder(8, dim=8, layers=1, heads=2), tokenizer)


def test_an_empty_prompt_is_refused(policy: TokenPolicy) -> None:
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        sample(policy, [""])


def test_sequences_longer_than_the_model_are_refused(policy: TokenPolicy) -> None:
    with pytest.raises(ValueError, match=r"up to 6[5-9] tokens.*64 \(max_position_embeddings\).*max_new_tokens"):
        sample(policy, ["a"], max_new_tokens=64)
    sample(policy, ["a"], max_new_tokens=62)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        policy.demonstrations(["a"], ["the " * 70])
    rollout = sample(policy, ["a"]).padded(65)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        policy.distribution(rollout)


# Scores


def as_rollout(sequences: Sequence[Tensor], given: int, **columns: Tensor) -> Rollout:
    """Somebody's sequences, of which the first `given` tokens are not the policy's."""
    tokens = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(s) for s in sequences])[:, None]
    own = mask & (torch.arange(tokens.shape[1]) >= given)
    return Rollout.create(
        task="t", group=torch.arange(len(mask)), mask=mask, loss_mask=own, actions=tokens, step_columns=columns
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_paths_that_do_not_see_each_other_are_scored_as_sequences_of_their_own(
    folder: Callable[[str], Path], kind: str, attention: str
) -> None:
    policy = TokenPolicy.from_pretrained(folder(kind), options={"attn_implementation": attention})
    prompt, first, second = (torch.tensor(ids) for ids in ([5, 9, 17], [20, 30, 40, 50], [21, 60, 70]))
    joined = torch.cat([prompt, first, second])
    visible = torch.ones(10, 10, dtype=torch.bool)
    visible[7:, 3:7] = False
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 4, 5])
    rollout = as_rollout([joined, joined], 3, visible=visible.expand(2, -1, -1), positions=positions.expand(2, -1))
    found = policy.logprob(rollout).detach()[1]
    torch.testing.assert_close(policy.logprob(rollout.padded(13))[1, :10], found, rtol=0, atol=1e-5)
    alone = [direct_logprob(policy, torch.cat([prompt, path])) for path in (first, second)]
    torch.testing.assert_close(found[3:7], alone[0][2:], rtol=0, atol=1e-5)
    # The second path's first token follows the first path's last in the row, so it is not scored as its own.
    torch.testing.assert_close(found[8:], alone[1][3:], rtol=0, atol=1e-5)
    plain = policy.logprob(as_rollout([joined], 3)).detach()[0]
    assert (plain[8:] - alone[1][3:]).abs().max() > 1e-3


def test_positions_alone_change_positions_and_not_what_is_seen(policy: TokenPolicy) -> None:
    tokens, positions = torch.arange(4, 12), torch.tensor([0, 1, 2, 3, 9, 10, 11, 12])
    found = policy.logprob(as_rollout([tokens], 1, positions=positions[None])).detach()[0]
    theirs = direct_logprob(policy, tokens, position_ids=positions[None], attention_mask=torch.ones(1, 8))
    torch.testing.assert_close(found[1:], theirs, rtol=0, atol=1e-5)
    assert (found - policy.logprob(as_rollout([tokens], 1)).detach()[0]).abs().max() > 1e-3


def test_visible_never_shows_what_comes_later(policy: TokenPolicy) -> None:
    tokens = torch.arange(4, 12)
    everything = torch.ones(1, 8, 8, dtype=torch.bool)
    found = policy.logprob(as_rollout([tokens], 1, visible=everything)).detach()[0]
    torch.testing.assert_close(found[1:], direct_logprob(policy, tokens), rtol=0, atol=1e-5)


def test_large_batches_are_read_in_parts_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TokenPolicy(tiny.language_model("gpt2"), tiny.tokenizer(), max_new_tokens=12)
    rollout = sample(policy)
    whole = policy.distribution(rollout)
    areas = []
    hidden = policy.network.hidden
    monkeypatch.setattr(policy.network, "hidden", lambda ids, **o: areas.append(ids.numel()) or hidden(ids, **o))
    monkeypatch.setattr("regimen.policies.reading.READ_AT_ONCE", 3)
    parts = policy.distribution(rollout)
    torch.testing.assert_close(parts.logprob, whole.logprob, rtol=0, atol=1e-5)
    own = rollout.loss_mask
    torch.testing.assert_close(parts.hidden[own], whole.hidden[own], rtol=0, atol=1e-5)
    assert len(areas) == 4
    assert sum(areas) < 0.8 * len(rollout) * (rollout.steps - 1)


def test_steps_after_the_last_one_asked_for_are_not_read(policy: TokenPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = sample(policy)
    where = rollout.loss_mask & (torch.arange(rollout.steps) <= 8)
    changed = torch.where(torch.arange(rollout.steps) <= 8, rollout.actions, 3)
    some = policy.distribution(rollout.replace(actions=changed), where)
    torch.testing.assert_close(some.logprob.detach(), rollout.logprobs * where, rtol=0, atol=1e-5)


def test_logits_of_a_large_batch_are_computed_block_by_block_with_the_same_gradients(
    policy: TokenPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probability (truncated), entropy and KL: values and gradients, and never more logits than allowed."""
    rollout = sample(policy, PROMPTS, temperature=0.7, top_k=9)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    frozen, found, rows = other.requires_grad_(False), [], []
    logits = policy.network.logits
    monkeypatch.setattr(policy.network, "logits", lambda states: rows.append(len(states)) or logits(states))
    for limit in (2**20, 300 * 5):
        rows.clear()
        monkeypatch.setitem(token_steps.LOGITS_AT_ONCE, "cpu", limit)
        policy.zero_grad()
        steps = policy.distribution(rollout)
        terms = [steps.logprob, steps.entropy(), steps.kl(frozen.distribution(rollout))]
        sum(
            (k + 1.0) * (term * torch.arange(term.numel()).view_as(term)).sum() for k, term in enumerate(terms)
        ).backward()
        found.append(([t.detach() for t in terms], [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert max(rows) <= 5
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    for new, old in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6 * float(old.abs().max()))


def test_asked_for_nothing_a_policy_gives_zeros(policy: TokenPolicy) -> None:
    rollout = sample(policy)
    steps = policy.distribution(rollout, torch.zeros_like(rollout.mask))
    assert steps.logprob.tolist() == torch.zeros(rollout.mask.shape).tolist()
    assert steps.hidden.shape == (*rollout.mask.shape, 16)


def test_answers_without_recorded_logprobs_are_scored_at_temperature_one(policy: TokenPolicy) -> None:
    greedy = sample(policy, PROMPTS, temperature=0.0)
    rows = policy.demonstrations(PROMPTS, ["the dog", "a", "yes or no"])
    knobs = Knobs.of(policy, temperature=0.5, top_k=3)
    written = DatasetTask("texts", rows, order="sequential").collect({}, knobs, torch.Generator(), 3)
    for rollout in (greedy, written):
        found = policy.logprob(rollout).detach()
        for row in range(3):
            length = int(rollout.lengths[row])
            expected = direct_logprob(policy, rollout.actions[row, :length]) * rollout.loss_mask[row, 1:length]
            torch.testing.assert_close(found[row, 1:length], expected, rtol=0, atol=1e-5)


def test_the_first_token_cannot_be_the_policys_own(policy: TokenPolicy) -> None:
    with pytest.raises(ValueError, match="first token of a sequence cannot be the policy's own"):
        policy.distribution(as_rollout([torch.arange(4, 8)], 0))


def test_entropy_and_kl_are_those_of_the_whole_distribution(policy: TokenPolicy) -> None:
    rollout = sample(policy, PROMPTS, temperature=0.7, top_k=9)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    steps = policy.distribution(rollout)
    entropy, kl = steps.entropy().detach(), steps.kl(other.distribution(rollout)).detach()
    for row in range(3):
        length, own = int(rollout.lengths[row]), rollout.loss_mask[row]
        tokens = rollout.actions[row, :length]
        mine, theirs = ((full_logits(p, tokens)[:-1] / 0.7).log_softmax(-1) for p in (policy, other))
        place = own[1:length]
        torch.testing.assert_close(
            entropy[row, 1:length][place], -(mine.exp() * mine).sum(-1)[place], rtol=0, atol=1e-5
        )
        expected = (mine.exp() * (mine - theirs)).sum(-1)[place]
        assert expected.max() > 1e-3
        torch.testing.assert_close(kl[row, 1:length][place], expected, rtol=1e-4, atol=1e-5)
        assert entropy[row][~own].abs().max() == 0
        assert kl[row][~own].abs().max() == 0
    with pytest.raises(ValueError, match="'flow_grpo' is not known to a token policy; expected exact, k1, k2 or k3"):
        steps.kl(steps, "flow_grpo")


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_k": 4}])
def test_gradient_agrees_with_finite_differences(setting: dict[str, float]) -> None:
    """GPT-2, which computes all in the precision of its weights."""
    policy = TokenPolicy(tiny.language_model("gpt2").double(), tiny.tokenizer(), max_new_tokens=5)
    rollout = sample(policy, PROMPTS, **setting)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    (policy.logprob(rollout) * weights).sum().backward()
    for parameter in list(policy.parameters())[::5]:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for side in (1e-6, -2e-6):
                parameter += side * direction
                values.append(float((policy.logprob(rollout) * weights).sum()))
            parameter += 1e-6 * direction
        assert parameter.grad is not None
        expected = float((parameter.grad * direction).sum())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-6)


# Heads


def test_hidden_states_are_those_before_each_token(policy: TokenPolicy) -> None:
    rollout = sample(policy, PROMPTS)
    steps = policy.distribution(rollout, rollout.mask)
    for row in range(3):
        length, own = int(rollout.lengths[row]), rollout.loss_mask[row]
        found = policy.network.base(rollout.actions[row, :length][None], output_hidden_states=True)
        before = found.hidden_states[-1][0, :-1]
        torch.testing.assert_close(steps.hidden[row, 1:length][own[1:length]], before[own[1:length]], rtol=0, atol=1e-5)


def test_a_critic_learns_on_the_policys_hidden_states(policy: TokenPolicy) -> None:
    rollout = sample(policy).replace(reward=torch.arange(12.0))
    cast = Cast(policy=policy, critic=ValueHead(16))
    credited = GAE(reads="policy", lam=1.0, normalize=None)(rollout, {}, cast)
    assert credited.advantages.shape == rollout.mask.shape
    # The critic says 0, so every own step's target is the reward.
    expected = rollout.reward[:, None].expand_as(rollout.mask)[rollout.loss_mask]
    assert torch.equal(credited["value_target"][rollout.loss_mask], expected)
    objective = ClippedSurrogateObjective() + ValueObjective(reads="policy")
    loss = objective(Batch(credited, cast, Knobs.of(objective), torch.Generator()))
    loss.total.backward()
    assert cast["critic"].layer.weight.grad.abs().max() > 0
    assert loss.metrics["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_a_head_reads_the_hidden_states_and_an_unknown_one_is_named() -> None:
    policy = word_policy(heads={"length": nn.Linear(16, 3)}, max_new_tokens=4)
    rollout = sample(policy, ["a", "b c"])
    steps = policy.distribution(rollout)
    torch.testing.assert_close(steps.head("length"), policy.heads["length"](steps.hidden))
    steps.head("length").sum().backward()
    assert policy.heads["length"].weight.grad is not None
    with pytest.raises(KeyError, match="no head 'mode'; it has: length"):
        steps.head("mode")


# Demonstrations


def test_demonstrations_are_prompts_answers_and_an_end() -> None:
    policy = word_policy()
    rows = policy.demonstrations(["a b", "c"], ["d", "a a"])
    begin, end = 1, 2
    a, b, c, d = policy.encode_answer("a b c d").tolist()
    assert rows["actions"].tolist() == [[begin, a, b, d, end], [begin, c, a, a, end]]
    assert rows["loss_mask"].tolist() == [[False, False, False, True, True], [False, False, True, True, True]]
    rows = policy.demonstrations(["a b", "c"], ["d", "a"], end=False)
    assert rows["actions"].tolist() == [[begin, a, b, d], [begin, c, a, 0]]
    assert rows["mask"].tolist() == [[True] * 4, [True] * 3 + [False]]


def test_demonstrations_that_cannot_be_learned_from_are_refused() -> None:
    policy = word_policy()
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        policy.demonstrations(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="answer 1 has no tokens"):
        policy.demonstrations(["a", "b"], ["c", ""], end=False)


# References and adapters


def test_a_reference_is_frozen_and_stays_as_it_was(policy: TokenPolicy) -> None:
    rollout, reference = sample(policy), policy.reference()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    assert not any(p.requires_grad for p in reference.parameters())
    torch.testing.assert_close(reference.distribution(rollout).logprob, rollout.logprobs, rtol=0, atol=1e-5)
    assert (policy.logprob(rollout) - rollout.logprobs).abs().max() > 1e-3


def short_answers() -> FunctionReward:
    return FunctionReward(lambda rollout: -rollout.loss_mask.sum(1).float(), "short")


def grpo(policy: TokenPolicy, steps: int = 2, **stage: Any) -> Regimen:
    """The shortest regimen that moves a policy's weights."""
    return Regimen(
        cast=Cast(policy=policy),
        stages=[
            Stage(
                name="grpo",
                tasks=[PromptTask("texts", ask(PROMPTS), group_size=4)],
                reward=short_answers(),
                credit=GroupRelativeAdvantage(),
                updates=[Update(ClippedSurrogateObjective(), learning_rate=1e-2)],
                steps=steps,
                batch_size=12,
                **stage,
            )
        ],
    )


def snapshot(policy: TokenPolicy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


@pytest.fixture
def adapted(folder: Callable[[str], Path], kind: str) -> TokenPolicy:
    pytest.importorskip("peft")
    return TokenPolicy.from_pretrained(folder(kind), lora_rank=2, max_new_tokens=6, stop=["e"])


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_an_update_changes_the_adapters_and_nothing_else(adapted: TokenPolicy) -> None:
    before = snapshot(adapted)
    outcome = train(grpo(adapted), seed=0)
    moved = {name for name, value in snapshot(adapted).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert {name for name in before if "lora_B" in name} <= moved
    assert outcome.counters.gradient_steps == 2


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_the_reference_of_a_policy_with_adapters_is_the_policy_without(adapted: TokenPolicy) -> None:
    rollout, reference = sample(adapted), adapted.reference()
    assert list(reference.parameters()) == []
    assert reference.reference() is reference
    assert adapted.distribution(rollout).kl(reference.distribution(rollout)).abs().max() < 1e-6
    regimen_ = grpo(adapted, rules=[ReferenceRefresh(mode="fixed")])
    train(regimen_, seed=0)
    steps = adapted.distribution(rollout)
    assert (steps.kl(regimen_.cast["reference"].distribution(rollout)) > 1e-6).any()
    torch.testing.assert_close(reference.distribution(rollout).logprob, rollout.logprobs, rtol=0, atol=1e-5)
    greedy = reference.sample(ask(PROMPTS), Knobs.of(reference, temperature=0.0), torch.Generator())
    with adapted.network.adapters_disabled():
        assert torch.equal(greedy.actions, sample(adapted, PROMPTS, temperature=0.0).actions)
    assert "WithoutAdapters" in repr(reference)


def test_the_reference_switches_adapters_of_the_output_layer_off_too(folder: Callable[[str], Path]) -> None:
    pytest.importorskip("peft")
    policy = TokenPolicy.from_pretrained(folder("qwen2"), max_new_tokens=6)
    rollout = sample(policy)
    policy.network.lora(2, targets=["lm_head"])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert (policy.logprob(rollout) - rollout.logprobs).abs().max() > 1e-3
    torch.testing.assert_close(policy.reference().logprob(rollout), rollout.logprobs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_a_loss_with_the_reference_still_reaches_the_adapters(adapted: TokenPolicy) -> None:
    """Looking up the reference in between switches the adapters off and on."""
    rollout = sample(adapted).replace(advantages=torch.ones(12, 1).expand(12, sample(adapted).steps))
    cast, objective = (
        Cast(policy=adapted, reference=adapted.reference()),
        ClippedSurrogateObjective() + 0.1 * ReferenceKL("exact"),
    )
    objective(Batch(rollout, cast, Knobs.of(objective), torch.Generator())).total.backward()
    reached = [name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert reached
    assert all("lora_B" in name for name in reached)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_a_policy_with_adapters_resumes_to_the_same_weights(
    folder: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")

    def fresh() -> TokenPolicy:
        torch.manual_seed(0)
        return TokenPolicy.from_pretrained(folder(kind), lora_rank=2, max_new_tokens=6)

    whole, cut, resumed = fresh(), fresh(), fresh()
    rules = [ReferenceRefresh(mode="fixed")]
    train(grpo(whole, steps=3, rules=rules), seed=0)

    def stop_after_two(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(grpo(cut, steps=3, rules=rules), seed=0, out=tmp_path, checkpoint_every=1, listener=stop_after_two)
    train(grpo(resumed, steps=3, rules=rules), seed=0, out=tmp_path, checkpoint_every=1, resume=True)
    for name, value in snapshot(whole).items():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_checkpoints_of_a_policy_with_adapters_hold_the_adapters_only(adapted: TokenPolicy, tmp_path: Path) -> None:
    train(grpo(adapted), seed=0, out=tmp_path)
    names = load_tree(next(tmp_path.glob("cast-*.safetensors")))["members"]["policy"].keys()
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_saved_adapters_are_loaded_onto_their_model(adapted: TokenPolicy, tmp_path: Path) -> None:
    train(grpo(adapted), seed=0)
    adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))
    again = TokenPolicy.from_pretrained(tmp_path, max_new_tokens=6, stop=["e"])
    rollout = sample(adapted)
    assert torch.equal(sample(again).actions, rollout.actions)
    torch.testing.assert_close(again.logprob(rollout), adapted.logprob(rollout), rtol=0, atol=1e-6)
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_a_saved_policy_is_loaded_with_its_weights(policy: TokenPolicy, tmp_path: Path) -> None:
    with torch.no_grad():
        next(policy.parameters()).add_(0.1)
    policy.save_pretrained(tmp_path)
    again = TokenPolicy.from_pretrained(tmp_path, max_new_tokens=10, stop=["e", "a"])
    assert torch.equal(sample(again).actions, sample(policy).actions)


# Learning


def test_grpo_learns_to_say_the_rewarded_word() -> None:
    policy = word_policy("a b c d e f g h", max_new_tokens=1)
    said = FunctionReward(lambda rollout: torch.tensor([float(text == "g") for text in rollout["text"]]), "said")
    assert said_share(policy) < 0.3
    task = PromptTask("words", ask(["a", "b"]), group_size=16)
    update = Update(ClippedSurrogateObjective(), learning_rate=1e-2)
    stage = Stage(
        name="grpo",
        tasks=[task],
        reward=said,
        credit=GroupRelativeAdvantage(),
        updates=[update],
        steps=40,
        batch_size=64,
    )
    train(Regimen(cast=Cast(policy=policy), stages=[stage]), seed=0)
    assert said_share(policy) > 0.9


def said_share(policy: TokenPolicy) -> float:
    texts = sample(policy, ["a", "b"] * 100)["text"]
    return sum(text == "g" for text in texts) / len(texts)


def test_supervised_learning_copies_a_table_of_facts() -> None:
    words = [str(number) for number in range(12)]
    facts = {word: f"{words[5 * place % 12]} {words[7 * place % 12]}" for place, word in enumerate(words)}
    tokenizer = word_tokenizer(words)
    policy = TokenPolicy(small_decoder(len(tokenizer), dim=32, layers=1, heads=2), tokenizer, max_new_tokens=4)
    rows = policy.demonstrations(list(facts), list(facts.values()))
    update = Update(SFTObjective(), learning_rate=5e-3)
    stage = Stage(name="sft", tasks=[DatasetTask("facts", rows)], updates=[update], steps=80, batch_size=12)
    train(Regimen(cast=Cast(policy=policy), stages=[stage]), seed=0)
    answers = sample(policy, list(facts), temperature=0.0)
    assert list(answers["text"]) == list(facts.values())
    assert not answers["truncated"].any()
