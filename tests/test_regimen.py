"""A regimen refuses what does not fit when it is built, and says what would."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from regimen import Cast, Knob, Regimen, Stage, Update
from regimen.controllers import Constant, Schedule
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, ReferenceKL
from regimen.policies import FlowPolicy
from regimen.tasks import DatasetTask


def cast() -> Cast:
    return Cast(policy=FlowPolicy(MLPDenoiser((1, 2, 2), 2, width=8, blocks=1), (1, 2, 2)))


def data(name: str = "data") -> DatasetTask:
    rows = TensorDict({"image": torch.zeros(2, 1, 2, 2), "context": {"condition": torch.arange(2)}}, batch_size=[2])
    return DatasetTask(name, rows)


def stage(**settings: object) -> Stage:
    options: dict[str, object] = {"updates": [Update(FlowMatchingObjective())], **settings}
    return Stage("fit", [data()], 1, **options)  # type: ignore[arg-type]


def test_controller_of_an_unread_knob_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="moves 'noise_levle'.*did you mean 'noise_level'"):
        Regimen(cast(), [stage(controllers=[Schedule("noise_levle", Constant(1))])])


def test_two_controllers_of_one_knob_are_refused() -> None:
    both = [Schedule("guidance", Constant(1)), Schedule("guidance", Constant(2))]
    with pytest.raises(ValueError, match="'guidance' is moved by two controllers"):
        Regimen(cast(), [stage(controllers=both)])


def test_unknown_setting_lists_the_knobs() -> None:
    with pytest.raises(ValueError, match="no component reads a knob 'temperature'.*guidance"):
        Regimen(cast(), [stage()], knobs={"temperature": 1.0})


def test_value_outside_the_range_names_knob_and_range() -> None:
    with pytest.raises(ValueError, match=r"knob 'noise_level'.*gave -1.0, expected a finite number in \[0.0, inf\]"):
        Regimen(cast(), [stage()], knobs={"noise_level": -1.0})


def test_knob_of_two_defaults_must_be_settled() -> None:
    objective = Knob("kl_weight", 0.1) * ReferenceKL() + Knob("kl_weight", 0.2) * ClippedSurrogateObjective()
    with pytest.raises(ValueError, match="'kl_weight' has two defaults: 0.1.*and 0.2"):
        Regimen(cast(), [stage(updates=[Update(objective)])])
    Regimen(cast(), [stage(updates=[Update(objective)])], knobs={"kl_weight": 0.3})


def test_unknown_member_is_named() -> None:
    with pytest.raises(ValueError, match="trains 'critic', which is not in the cast: policy"):
        Regimen(cast(), [stage(updates=[Update(FlowMatchingObjective(), members=["critic"])])])


def test_names_must_be_unique() -> None:
    with pytest.raises(ValueError, match="stages: fit occur twice"):
        Regimen(cast(), [stage(), stage()])
    with pytest.raises(ValueError, match="tasks of stage 's': data occur twice"):
        Stage("s", [data(), data()], 1)


def test_stage_settings_hold_in_their_stage_only() -> None:
    first = stage(knobs={"guidance": 2.0})
    second = Stage("second", [data()], 1, updates=[Update(FlowMatchingObjective())])
    regimen = Regimen(cast(), [first, second], knobs={"noise_level": 0.5})
    boards = [s.board(regimen.cast, regimen.knobs) for s in regimen.stages]
    assert [board["guidance"] for board in boards] == [2.0, 1.0]
    assert [board["noise_level"] for board in boards] == [0.5, 0.5]
    assert boards[0].for_evaluation()["noise_level"] == 0.0
