"""Text games as partners: what a game with TextWorld's methods says, pays and tells; and turns that are attributed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dialogues import GAME, collect, tiny

from regimen.cast import Cast, ReferenceRefresh
from regimen.credit import GAE, RewardRedistribution
from regimen.estimators import MeasureMisfit
from regimen.loop import train
from regimen.memory import HoldOut, ReplayMemory
from regimen.models.progress import PolicyEncoder, ProgressEstimator
from regimen.models.value_head import ValueHead
from regimen.objectives import ReferenceKL, ReturnDecompositionObjective, ppo
from regimen.regimen import Regimen, Stage
from regimen.rewards import GroundingReward, OutcomeReward, Scene, judge
from regimen.tasks import DialogueTask, OneByOne
from regimen.tasks.worlds.text_games import GamePartner, TextGames, alfworld
from regimen.update import Draws, Epochs, Update


class Door:
    """A game with the methods of `textworld.gym`: open the door and go through it."""

    def __init__(self, file: str = "door") -> None:
        self.file, self.open = file, False

    def reset(self) -> tuple[str, Mapping[str, Any]]:
        return f"You are before the door of {self.file}.", {"won": False}

    def step(self, command: str) -> tuple[str, float, bool, Mapping[str, Any]]:
        if command == "open door":
            self.open = True
            return "The door is open.", 0, False, {"won": False}
        if command == "go through" and self.open:
            return "You are through.", 1, True, {"won": True}
        return "Nothing happens.", 0, False, {"won": False}


def test_a_game_pays_for_winning_and_tells_what_did_anything() -> None:
    partner = GamePartner(Door("the house"))
    assert partner.opening == "You are before the door of the house."
    replies = [partner.reply(text) for text in ("go through", "open door\nand then", "", " go through\n")]
    assert [reply.facts["valid"] for reply in replies] == [0.0, 1.0, 0.0, 1.0]
    assert [reply.reward for reply in replies] == [0.0, 0.0, 0.0, 1.0]
    assert [reply.done for reply in replies] == [False, False, False, True]
    assert replies[-1].success
    assert replies[1].text == "The door is open."


def test_games_are_numbered_and_begun_anew() -> None:
    games = TextGames(("a", "b"), Door)
    assert games(5, Random(0)).opening == "You are before the door of b."
    assert games(5, Random(0)).game is not games(5, Random(0)).game
    with pytest.raises(ValueError, match="TextGames: there are no files"):
        TextGames((), Door)


def test_files_of_alfworld_are_found_and_loaded_by_textworld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that the real packages take, on stand-ins for them."""
    for name in ("b", "a"):
        folder = tmp_path / "json_2.1.1" / "train" / name
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").touch()
    asked: list[Any] = []
    gym, files, alfred = (ModuleType(name) for name in ("textworld.gym", "textworld", "alfred_tw_env"))
    gym.register_games = lambda *a, **k: asked.append((a, k)) or "tw-0"  # type: ignore[attr-defined, func-returns-value]
    gym.make = lambda name: Door(name)  # type: ignore[attr-defined]
    files.gym, files.EnvInfos = gym, lambda **k: k  # type: ignore[attr-defined]
    alfred.AlfredDemangler = lambda: "demangler"  # type: ignore[attr-defined]
    modules = {"textworld": files, "textworld.gym": gym, "alfworld.agents.environment.alfred_tw_env": alfred}
    for parent in ("alfworld", "alfworld.agents", "alfworld.agents.environment"):
        modules[parent] = ModuleType(parent)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    games = alfworld("train", str(tmp_path))
    assert [Path(file).parent.name for file in games.files] == ["a", "b"]
    assert games(0, Random(0)).opening == "You are before the door of tw-0."
    (positional, named), *_ = asked
    assert positional == ([games.files[0]], {"won": True})
    assert named == {"max_episode_steps": 50, "wrappers": ["demangler"]}


def test_games_that_are_not_there_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run alfworld-download, or set ALFWORLD_DATA"):
        alfworld("train", str(tmp_path))


# Turns of tokens


def task() -> DialogueTask:
    return DialogueTask("guess", OneByOne(GAME), max_turns=3, facts=("valid",), evaluation=range(7))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_turn_is_paid_on_its_last_token(kind: str) -> None:
    policy = tiny(kind)
    estimator = ProgressEstimator(PolicyEncoder(copy.deepcopy(policy)), 16)
    rollout, _ = judge(OutcomeReward(), collect(task(), policy), Scene())
    said = estimator(rollout)
    paid = said != 0
    assert torch.equal(paid.sum(1), rollout["turns"])
    assert not bool((paid & ~rollout.loss_mask).any())
    after = rollout.loss_mask[:, 1:] & (rollout.segment[:, 1:] == rollout.segment[:, :-1])
    assert not bool((paid[:, :-1] & after).any())


def test_foreign_tokens_have_no_advantage_and_the_kl_is_of_own_tokens() -> None:
    policy = tiny()
    rollout, _ = judge(OutcomeReward(), collect(task(), policy), Scene())
    credit = RewardRedistribution("uniform", inner=GAE(0.95, normalize=None))
    critic = {"critic": lambda rollout: torch.zeros(rollout.mask.shape)}
    credited = credit(rollout, {"alpha": 1.0}, critic)
    assert not bool(credited.advantages[~rollout.loss_mask].any())
    assert torch.allclose(credited["contributions"].sum(1), rollout.reward)
    other = tiny()
    kl = policy.distribution(rollout, rollout.loss_mask).kl(other.distribution(rollout, rollout.loss_mask))
    assert not bool(kl[~rollout.loss_mask].any())


def test_a_language_model_is_attributed_and_trained_and_the_same_seed_is_the_same() -> None:
    """Explore, fit a copy of the model, gate, PPO with a KL: the whole of the paper on turns of tokens."""

    def run() -> SimpleNamespace:
        torch.manual_seed(0)
        policy = tiny()
        estimator = ProgressEstimator(PolicyEncoder(copy.deepcopy(policy)), 16)
        memory = HoldOut(ReplayMemory(32), ReplayMemory(32), 4)
        fit = Update(ReturnDecompositionObjective(), ["estimator"], batches=Draws(3, 8, after=24), micro_batch=4)
        # How many turns were numbers at all: untrained, it hits the hidden one too seldom.
        outcome = OutcomeReward("valid")
        explore = Stage("explore", [task()], 2, 16, reward=outcome, updates=[fit], memory=memory)
        check = Stage("check", [task()], 0, 16, memory=memory, prepare=[MeasureMisfit()])
        credit = RewardRedistribution(final="outcome", inner=GAE(reads="policy"), gate=torch.inf)
        objective = ppo(reads="policy") + 0.05 * ReferenceKL("k3")
        learn = Stage(
            "learn", [task()], 2, 16, reward=outcome + 0.1 * GroundingReward(), credit=credit,
            updates=[Update(objective, ["policy", "critic"], batches=Epochs(1, 2))],
            rules=[ReferenceRefresh()],
        )  # fmt: skip
        cast = Cast(policy=policy, critic=ValueHead(16), estimator=estimator)
        train(Regimen(cast, [explore, check, learn]), seed=1)
        return SimpleNamespace(weights=policy.state_dict(), misfit=float(estimator.misfit))

    first, second = run(), run()
    assert 0 < first.misfit == second.misfit < torch.inf
    assert all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())
