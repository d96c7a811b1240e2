"""VPL: the smoke test, what arms differ in, what is hidden, claims, exact resume, and texts judged by readers."""

from __future__ import annotations

import dataclasses
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen import papers
from regimen.checkers import check
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, Outcome, train
from regimen.papers.vpl import METHODS, PAPER, Method, Settings, Users, asked, gain, half, inquiring, personal
from regimen.progress import Event
from regimen.runs import read_metrics
from regimen.tasks.preferences import pairs_of
from regimen.tasks.worlds.readers import Readers, rated_answers, rated_pairs, text_features
from tiny_models import byte_tokenizer, save

QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(
    QUICK, users=40, held_out=20, reward_steps=3, reward_batch=8, walks=4, control_steps=3, control_batch=8, episodes=4
)
ARMS = ["btl", "vpl", "oracle", "inquiring"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick."""
    out = tmp_path_factory.mktemp("vpl") / "quick"
    run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


# The smoke test


def test_every_arm_is_trained_and_every_claim_computed(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert sorted(results["arms"]) == sorted(ARMS)
    assert {entry["name"] for entry in results["left_out"]} == {"encoder", "spo"}
    assert all(claim["missing"] == {} for claim in results["claims"])


def test_arms_read_as_much(quick: Path) -> None:
    spent = read_results(quick)["arms"]
    for arm in ("btl", "vpl", "oracle"):
        assert spent[arm]["0"]["rows"] == 150 * 128 + 30 * 256
        assert spent[arm]["0"]["samples"] == 0
    assert spent["inquiring"]["0"]["rows"] == 150 * 128


def test_a_few_updates_tell_users_apart(quick: Path) -> None:
    final = {arm: found["0"]["final"] for arm, found in read_results(quick)["arms"].items()}
    assert final["vpl"]["users/accuracy"] > final["btl"]["users/accuracy"] + 0.1
    assert final["vpl"]["users/kl"] > 0.3
    assert final["btl"]["users/kl"] == 0


def test_claims_are_differences() -> None:
    def result(**metrics: float) -> ArmResult:
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        return ArmResult([{"stage": "policy", "metrics": named}], 0, 0, 0, 0.0)

    seed = {
        "vpl": result(users__accuracy=0.9, square__success=0.7),
        "btl": result(users__accuracy=0.6, square__success=0.1),
        "inquiring": result(queries__mixture_2=0.95, queries__random_2=0.8, queries__random_4=0.9),
    }
    assert gain("users/accuracy", "vpl", "btl", seed) == pytest.approx(0.3)
    assert asked(2, "mixture", seed) == pytest.approx(0.15)
    assert half(seed) == pytest.approx(0.05)
    judged = [claim for claim in PAPER.claims if claim.judged]
    assert [(claim.name, claim.above) for claim in judged] == [("accuracy", 0.1), ("success", 0.1)]
    assert PAPER.method == "vpl"


# What arms differ in


def test_every_arm_has_the_same_users_and_labels() -> None:
    users = {name: Users(METHODS[name][1], 3, TINY) for name in ("btl", "vpl", "oracle", "concatenating")}
    for name, mine in users.items():
        for rows, others in ((mine.asked, users["vpl"].asked), (mine.new, users["vpl"].new)):
            assert torch.equal(rows["step_columns"]["label"], others["step_columns"]["label"]), name
            assert torch.equal(rows["step_columns"]["first"][..., :2], others["step_columns"]["first"])
    assert users["oracle"].states == 5
    assert users["vpl"].states == users["btl"].states == 2


def test_nothing_that_is_learned_from_tells_the_kind_but_to_the_oracle() -> None:
    """With the kinds garbled, labels and all else as they were, training gives the same weights."""
    outcomes = []
    for garbled in (False, True):
        regimen = personal(Method(), 0, dataclasses.replace(TINY, control_steps=0))
        task: Any = regimen.stages[0].tasks[0]
        if garbled:
            task.rows["user"][:] = 0
        train(regimen, listener=lambda event: None)
        outcomes.append([weight.detach().clone() for weight in regimen.cast["reward_model"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_the_judge_is_not_trained_while_it_judges() -> None:
    regimen = personal(Method(), 0, TINY)
    train(dataclasses.replace(regimen, stages=regimen.stages[:1]), listener=lambda event: None)
    before = [weight.detach().clone() for weight in regimen.cast["reward_model"].parameters()]
    policy = regimen.cast["policy"].head.mean.weight.detach().clone()
    train(dataclasses.replace(regimen, stages=regimen.stages[1:]), listener=lambda event: None)
    assert all(torch.equal(a, b) for a, b in zip(before, regimen.cast["reward_model"].parameters(), strict=True))
    assert not torch.equal(policy, regimen.cast["policy"].head.mean.weight)


def test_the_weight_of_the_divergence_rises_to_the_bound(quick: Path) -> None:
    records = read_metrics(next(quick.rglob("vpl*/**/metrics.jsonl")))
    weights = [r["metrics"]["knob/kl_weight"] for r in records if r["kind"] == "step" and r["stage"] == "reward"]
    assert weights[0] == 0
    assert weights[-1] == 1
    assert weights[37] == pytest.approx(37 / 75)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_arms_regimen_passes_the_checks(name: str) -> None:
    assert check(personal(METHODS[name][1], 0, TINY)).messages == []


def test_questions_are_chosen_by_a_reward_that_met_users_of_whom_little_was_known() -> None:
    regimen = inquiring(0, TINY)
    rollout = regimen.stages[0].tasks[0].collect(regimen.cast, {}, torch.Generator().manual_seed(0), 20)
    assert set(rollout["shown"].sum(1).tolist()) > {1, 8}
    assert bool(rollout.loss_mask.all())
    assert check(regimen).messages == []


# Resume


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def run(out: Path, stop: tuple[str, int] | None = None, resume: bool = False) -> Outcome:
        def listener(event: Event) -> None:
            if event.kind == "step" and (event.stage, event.step) == stop:
                signal.raise_signal(signal.SIGTERM)

        return train(personal(Method(), 0, TINY), seed=5, out=out, resume=resume, listener=listener)

    whole = run(tmp_path / "whole")
    for stop in (("reward", 2), ("policy", 2)):
        out = tmp_path / stop[0]
        with pytest.raises(Interrupted):
            run(out, stop)
        again = run(out, resume=True)
        assert again.evaluations[-1]["metrics"] == whole.evaluations[-1]["metrics"]
        for name in ("reward_model", "policy", "critic", "value"):
            for a, b in zip(whole.cast[name].parameters(), again.cast[name].parameters(), strict=True):
                assert torch.equal(a, b)


# Texts


def record(number: int, *ratings: tuple[str, str, str, str]) -> dict[str, Any]:
    """A prompt in UltraFeedback's form, whose answers have ratings in four aspects."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    answers = [
        {
            "response": f"answer {number} {place}",
            "annotations": {aspect: {"Rating": rating} for aspect, rating in zip(aspects, rated, strict=True)},
        }
        for place, rated in enumerate(ratings)
    ]
    return {"instruction": f"prompt {number}", "completions": answers}


RECORDS = [
    record(number, ("5", "1", "3", "2"), ("2", "4", "3", "1"), ("5", "5", "5", "5"), ("N/A", "1", "1", "1"))
    for number in range(12)
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 of the real class, tiny and at random."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=12, n_layer=1, n_head=2, n_positions=64)
    return save(tmp_path_factory.mktemp("gpt2"), GPT2Model(config), tokenizer)


def test_pairs_are_those_on_whose_order_aspects_disagree() -> None:
    found = rated_pairs(RECORDS[:2])
    assert len(found.texts) == 6  # One answer has no rating in some aspect.
    assert found.texts[1] == "prompt 0\n\nanswer 0 1"
    assert found.index.tolist() == [[0, 1], [3, 4]]
    assert found.ahead[0].tolist() == [3, -3, 0, 1]
    with pytest.raises(ValueError, match="no two answers are ordered differently by helpfulness"):
        rated_pairs([record(0, ("1", "1", "1", "1"), ("2", "2", "2", "2"))])


def test_a_reader_prefers_what_is_ahead_in_the_readers_aspect() -> None:
    pairs = rated_pairs(RECORDS)
    readers = Readers(torch.arange(36.0)[:, None], pairs)
    with pytest.raises(ValueError, match="instruction_following orders no pair of 12"):
        readers.sets(3, 2, torch.Generator())
    readers = Readers(torch.arange(36.0)[:, None], dataclasses.replace(pairs, ahead=pairs.ahead[:, [0, 1, 3]]))
    rows = readers.sets(30, 2, torch.Generator().manual_seed(0))
    asked_ = pairs_of(rows)
    assert torch.equal(asked_.label, (rows["user"] != 1).float()[:, None].expand(-1, 2))
    assert bool((asked_.first == asked_.second - 1).all())
    told = dataclasses.replace(readers, tells=True)
    assert told.states == 4
    assert told.sets(5, 2, torch.Generator())["step_columns"]["first"].shape == (5, 2, 1, 4)


def test_features_are_those_of_a_texts_last_token(language_model: str) -> None:
    together = text_features(["a long text, read to its end", "short"], language_model, longest=16)
    alone = text_features(["short"], language_model, longest=16)
    assert together.shape == (2, 12)
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    longer = text_features(["yet more of a long text, read to its end"], language_model, longest=16)
    assert torch.allclose(together[0], longer[0], atol=1e-5)


def test_rewards_of_readers_are_trained_on_texts_of_a_language_model(tmp_path: Path, language_model: str) -> None:
    data = tmp_path / "rated.jsonl"
    mixed = [record(n, ("5", "1", "4", "2"), ("2", "4", "3", "3")) for n in range(30)]
    data.write_text("\n".join(json.dumps(each) for each in mixed))
    assert rated_answers(data) == mixed
    s = dataclasses.replace(
        TINY, world="texts", data=str(data), model=language_model, control_steps=0, attention=True, latent=3, pairs=2
    )
    found = {}
    for name in ("btl", "vpl", "oracle"):
        regimen = personal(METHODS[name][1], 0, s)
        found[name] = train(regimen, listener=lambda event: None).evaluations[-1]["metrics"]
        assert set(found[name]) >= {"users/accuracy", "users/probe"}
    assert found["btl"]["users/kl"] == 0
    with pytest.raises(ValueError, match="'inquiring' asks about places"):
        inquiring(0, s)


def test_the_full_scale_has_no_policy() -> None:
    full: Settings = PAPER.scales["full"]
    assert (full.world, full.control_steps) == ("texts", 0)
    with pytest.raises(ValueError, match="control_steps is 10 in the world of texts"):
        dataclasses.replace(full, control_steps=10)
    assert isinstance(Users(Method(), 0, TINY).asked, TensorDict)
