"""The cast: who is trainable, copies, forks, tied and shared weights, and the rule that refreshes a reference."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regimen.cast import Cast, CastRule, ReferenceRefresh
from regimen.knobs import Knob
from regimen.policies import FlowPolicy
from regimen.storage import load_tree, save_tree


class Net(nn.Module):
    """A weight that is trained, a frozen one, a buffer of floats and one of integers."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.frozen = nn.Parameter(torch.full((3,), value), requires_grad=False)
        self.register_buffer("mean", torch.full((1,), value))
        self.register_buffer("count", torch.tensor(int(value)))
        self.version = 0


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(value)


def test_is_a_mapping_of_members() -> None:
    cast = Cast(policy=Net(), note={"any": "thing"})
    assert list(cast) == ["policy", "note"]
    assert len(cast) == 2
    assert "policy" in cast
    assert "critic" not in cast
    with pytest.raises(KeyError, match="no member 'critic'; it has: policy, note"):
        cast["critic"]
    with pytest.raises(KeyError, match="it has: none"):
        Cast()["policy"]
    assert Cast().device == torch.device("cpu")


def test_remembers_which_parameters_were_trainable() -> None:
    policy, critic = Net(), Net()
    cast = Cast(policy=policy, critic=critic)
    assert cast.trainable(["policy"])[0] is policy.weight
    assert len(cast.trainable(["policy"])) == 1
    cast.train_only(["critic"])
    assert (policy.weight.requires_grad, critic.weight.requires_grad) == (False, True)
    cast.train_only(["policy", "critic"])
    assert policy.weight.requires_grad
    assert critic.weight.requires_grad
    assert not policy.frozen.requires_grad
    cast.train_only([])
    assert not any(p.requires_grad for p in policy.parameters())
    assert len(cast.trainable(["policy", "critic"])) == 2


@pytest.mark.parametrize("member", [nn.ReLU(), Net().requires_grad_(False), {"not": "a module"}])
def test_member_without_anything_to_train_is_named(member: Any) -> None:
    with pytest.raises(ValueError, match="member 'thing' has no trainable parameters: it is frozen, a copy, or not a"):
        Cast(thing=member).trainable(["thing"])


def test_shared_modules_are_trained_once_and_opened_with_either_owner() -> None:
    shared = nn.Linear(2, 2)
    policy, critic = nn.Sequential(shared, nn.Linear(2, 2)), nn.Sequential(shared, nn.Linear(2, 1))
    cast = Cast(policy=policy, critic=critic, connector=shared)
    assert len(cast.trainable(["policy", "critic"])) == 6
    cast.train_only(["connector"])
    assert [p.requires_grad for p in policy.parameters()] == [True, True, False, False]


def test_snapshot_is_frozen_and_stays_behind() -> None:
    policy = Net(1.0).train()
    cast = Cast(policy=policy)
    policy.weight.grad = torch.ones(2)
    cast.snapshot("policy", "start")
    fill(policy, 5.0)
    start = cast["start"]
    assert start.weight.tolist() == [1.0, 1.0]
    assert not any(p.requires_grad for p in start.parameters())
    assert start.weight.grad is None
    assert not start.training
    assert policy.training
    assert policy.weight.requires_grad
    with pytest.raises(ValueError, match="member 'start' has no trainable parameters"):
        cast.trainable(["start"])
    cast.snapshot("policy", "start")
    assert cast["start"].weight.tolist() == [5.0, 5.0]


def test_restore_copies_weights_into_the_member_itself() -> None:
    policy = Net(1.0)
    cast = Cast(policy=policy)
    cast.snapshot("policy", "start")
    fill(policy, 5.0)
    cast.restore("policy", "start")
    assert cast["policy"] is policy
    assert policy.weight.tolist() == [1.0, 1.0]
    assert policy.mean.tolist() == [1.0]
    assert policy.weight.requires_grad


def test_fork_is_trainable_where_its_parent_is() -> None:
    policy = Net(1.0)
    cast = Cast(policy=policy)
    cast.fork("policy", "child")
    child = cast["child"]
    assert cast.trainable(["child"])[0] is child.weight
    assert len(cast.trainable(["child"])) == 1
    fill(child, 3.0)
    assert policy.weight.tolist() == [1.0, 1.0]
    cast.train_only(["child"])
    assert (child.weight.requires_grad, policy.weight.requires_grad) == (True, False)
    # A child of a policy that is closed just now is trainable all the same.
    cast.fork("policy", "second")
    assert len(cast.trainable(["second"])) == 1


def test_fork_that_is_replaced_is_forgotten() -> None:
    cast = Cast(policy=Net())
    cast.fork("policy", "child")
    old = weakref.ref(cast["child"].weight)
    cast.fork("policy", "child")
    gc.collect()
    assert old() is None
    cast.snapshot("policy", "child")
    with pytest.raises(ValueError, match="member 'child' has no trainable parameters"):
        cast.trainable(["child"])


def test_tied_weights_are_one_parameter_and_stay_tied() -> None:
    cast = Cast(policy=Tied())
    assert len(cast.trainable(["policy"])) == 1
    cast.fork("policy", "child")
    cast.snapshot("policy", "start")
    for name in ("child", "start"):
        assert cast[name].head.weight is cast[name].embed.weight
        assert cast[name].head.weight is not cast["policy"].head.weight
    assert len(cast.trainable(["child"])) == 1


def test_tied_weights_survive_a_file(tmp_path: Path) -> None:
    cast, other = Cast(policy=Tied()), Cast(policy=Tied())
    save_tree(tmp_path / "cast", cast.state_dict())
    other.load_state_dict(load_tree(tmp_path / "cast"))
    assert torch.equal(other["policy"].embed.weight, cast["policy"].embed.weight)
    assert other["policy"].head.weight is other["policy"].embed.weight


def test_knobs_are_those_of_the_members_and_not_of_their_copies(tiny_policy: Callable[..., FlowPolicy]) -> None:
    cast = Cast(policy=tiny_policy(), judge=nn.Linear(1, 1))
    cast.snapshot("policy", "start")
    cast.fork("policy", "child")
    owners = {owner for owner, _ in cast.knobs}
    assert owners == {"FlowPolicy 'policy'"}
    assert all(isinstance(knob, Knob) for _, knob in cast.knobs)


def test_state_round_trip_through_a_file_makes_copies_again(tmp_path: Path) -> None:
    cast = Cast(policy=Net(1.0), optimum=nn.Linear(1, 1))
    cast.snapshot("policy", "start")
    cast.fork("policy", "child")
    fill(cast["policy"], 2.0)
    fill(cast["child"], 3.0)
    cast["policy"].version = 7
    save_tree(tmp_path / "cast", cast.state_dict())

    again = Cast(policy=Net(9.0), optimum=nn.Linear(1, 1))
    again.load_state_dict(load_tree(tmp_path / "cast"))
    assert list(again) == ["policy", "optimum", "start", "child"]
    found = {name: float(again[name].weight[0].detach()) for name in ("policy", "start", "child")}
    assert found == {"policy": 2.0, "start": 1.0, "child": 3.0}
    assert torch.equal(again["optimum"].weight, cast["optimum"].weight)
    assert again["policy"].version == 7
    assert int(again["policy"].count) == 2
    assert len(again.trainable(["child"])) == 1
    with pytest.raises(ValueError, match="'start' has no trainable"):
        again.trainable(["start"])


def test_anything_with_a_state_is_a_member_that_is_kept() -> None:
    class Table:
        def __init__(self) -> None:
            self.counts = [0]

        def state_dict(self) -> dict[str, Any]:
            return {"counts": list(self.counts)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.counts = list(state["counts"])

    cast, again = Cast(table=Table(), text="no state"), Cast(table=Table(), text="no state")
    cast["table"].counts = [4, 2]
    again.load_state_dict(cast.state_dict())
    assert again["table"].counts == [4, 2]


def test_state_of_another_architecture_names_tensor_and_shapes() -> None:
    saved = Cast(policy=nn.Linear(3, 2)).state_dict()
    with pytest.raises(
        ValueError, match=r"'weight' of member 'policy' is \[2, 3\] in the file and \[2, 4\] here; build"
    ):
        Cast(policy=nn.Linear(4, 2)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'bias' of member 'policy' is \[2\] in the file and absent here"):
        Cast(policy=nn.Linear(3, 2, bias=False)).load_state_dict(saved)
    with pytest.raises(KeyError, match="no member 'policy'; it has: actor"):
        Cast(actor=nn.Linear(3, 2)).load_state_dict(saved)


# The rule that refreshes a reference.


def trained(rule: ReferenceRefresh, values: list[float], start: float = 1.0) -> tuple[Cast, list[float]]:
    """The copy's weight after each of some iterations, in which the policy's weights become `values`."""
    policy = Net(start)
    cast = Cast(policy=policy)
    rule.start(cast)
    followed = [float(cast["reference"].weight[0])]
    for step, value in enumerate(values, start=1):
        fill(policy, value)
        rule.after_step(cast, step)
        followed.append(float(cast["reference"].weight[0]))
    return cast, followed


def test_fixed_reference_stays_over_stages() -> None:
    rule = ReferenceRefresh(mode="fixed")
    cast, followed = trained(rule, [2.0, 3.0])
    assert followed == [1.0, 1.0, 1.0]
    reference = cast["reference"]
    rule.start(cast)
    assert cast["reference"] is reference


def test_copied_reference_is_fresh_at_every_stage() -> None:
    rule = ReferenceRefresh(mode="copy")
    cast, followed = trained(rule, [2.0, 3.0])
    assert followed == [1.0, 1.0, 1.0]
    rule.start(cast)
    assert float(cast["reference"].weight[0]) == 3.0


def test_copied_reference_every_so_many_iterations() -> None:
    _, followed = trained(ReferenceRefresh(mode="copy", every=2), [2.0, 3.0, 4.0, 5.0, 6.0])
    assert followed == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0]


def test_average_follows_with_its_decay() -> None:
    """1 -> .9 * 1 + .1 * 2 = 1.1 -> .99 + .3 = 1.29 -> 1.161 + .4 = 1.561."""
    cast, followed = trained(ReferenceRefresh(mode="ema", decay=0.9), [2.0, 3.0, 4.0])
    assert followed == pytest.approx([1.0, 1.1, 1.29, 1.561])
    reference = cast["reference"]
    assert reference.mean.tolist() == pytest.approx([1.561])
    assert reference.frozen.tolist() == pytest.approx([1.561] * 3)
    assert int(reference.count) == 4
    assert not any(p.requires_grad for p in reference.parameters())
    assert cast["policy"].weight.tolist() == [4.0, 4.0]


def test_average_every_so_many_iterations() -> None:
    _, followed = trained(ReferenceRefresh(mode="ema", decay=0.5, every=2), [2.0, 3.0, 4.0, 5.0])
    assert followed == pytest.approx([1.0, 1.0, 2.0, 2.0, 3.5])


def test_average_without_decay_is_a_copy() -> None:
    _, followed = trained(ReferenceRefresh(mode="ema", decay=0.0), [2.0, 7.0])
    assert followed == [1.0, 2.0, 7.0]


def test_average_counts_tied_weights_once_and_mixes_precisions() -> None:
    policy = Tied()
    policy.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    fill(policy, 1.0)
    cast = Cast(policy=policy)
    rule = ReferenceRefresh(mode="ema", decay=0.9)
    rule.start(cast)
    fill(policy, 2.0)
    rule.after_step(cast, 1)
    for tensor in (cast["reference"].embed.weight, cast["reference"].head.weight, cast["reference"].scale):
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1.1))


def test_average_goes_on_after_a_resume() -> None:
    rule = ReferenceRefresh(mode="ema", decay=0.9)
    cast, _ = trained(rule, [2.0, 3.0])
    again = Cast(policy=Net(0.0))
    again.load_state_dict(cast.state_dict())
    for resumed in (cast, again):
        fill(resumed["policy"], 4.0)
        rule.after_step(resumed, 3)
        assert resumed["reference"].weight.tolist() == pytest.approx([1.561] * 2)


def test_copies_of_two_members_under_names_of_their_own() -> None:
    cast = Cast(policy=Net(1.0), critic=Net(2.0))
    rules = [ReferenceRefresh(member="old"), ReferenceRefresh(member="target", of="critic", mode="ema", decay=0.5)]
    assert all(isinstance(rule, CastRule) for rule in rules)
    for rule in rules:
        rule.start(cast)
    fill(cast["critic"], 4.0)
    for rule in rules:
        rule.after_step(cast, 1)
    assert [float(cast[name].weight[0]) for name in ("old", "target")] == [1.0, 3.0]


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="mode 'average' is not one of fixed, copy, ema"):
        ReferenceRefresh(mode="average")  # type: ignore[arg-type]
    for settings in ({"decay": 1.0}, {"decay": -0.1}, {"every": 0}):
        with pytest.raises(ValueError, match=r"expected \[0, 1\) and >= 1"):
            ReferenceRefresh(**settings)
    with pytest.raises(KeyError, match="no member 'policy'; it has: critic"):
        ReferenceRefresh().start(Cast(critic=Net()))


def test_fixed_reference_of_a_policy_is_its_own_kind(tiny_policy: Callable[..., FlowPolicy]) -> None:
    policy = tiny_policy()
    cast = Cast(policy=policy)
    ReferenceRefresh(mode="fixed").start(cast)
    cast.train_only(["policy"])
    assert not any(p.requires_grad for p in cast["reference"].parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert len(list(cast.knobs)) == len(policy.knobs)


def test_a_member_starts_from_another_unless_a_state_has_its_own_weights() -> None:
    """Now, and when a state without it is loaded; from a state with it, it goes on."""
    cast = Cast(policy=nn.Linear(2, 3), student=nn.Linear(2, 3))
    cast.start("student", of="policy")
    assert torch.equal(cast["student"].weight, cast["policy"].weight)
    other = Cast(policy=nn.Linear(2, 3))
    cast.load_state_dict(other.state_dict())
    assert torch.equal(cast["student"].weight, other["policy"].weight)
    with torch.no_grad():
        cast["student"].weight.add_(1)
    again = Cast(policy=nn.Linear(2, 3), student=nn.Linear(2, 3))
    again.start("student", of="policy")
    again.load_state_dict(cast.state_dict())
    assert torch.equal(again["student"].weight, other["policy"].weight + 1)
    assert all(parameter.requires_grad for parameter in again["student"].parameters())
