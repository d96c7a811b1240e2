"""Transformers on trajectories: what each place may see, where tokens stand, and what is handed on."""

from __future__ import annotations

import pytest
import torch

from regimen.models import DestinationNetwork, NextPositionNetwork, TrackTransformer, TrajectoryNetwork


def transformer(seed: int = 0) -> TrackTransformer:
    torch.manual_seed(seed)
    return TrackTransformer(width=16, heads=2, layers=2)


def past(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 2, generator=torch.Generator().manual_seed(1))


def test_a_next_position_sees_no_later_one() -> None:
    network, track = NextPositionNetwork(transformer()), torch.randn(2, 19, 2)
    moved = track.clone()
    moved[:, 10] += 1
    before, after = network(track)[0], network(moved)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all(2).any()


def test_masks_do_not_outlive_a_pass() -> None:
    # The official code writes the full mask into the buffer of the causal one.
    shared = transformer()
    steps, way = NextPositionNetwork(shared), TrajectoryNetwork(shared, hidden=(8,))
    track = torch.randn(2, 19, 2)
    before = steps(track)[0]
    way(past(2), torch.zeros(2, 2))
    assert torch.equal(before, steps(track)[0])


def test_every_step_of_a_way_sees_the_destination_and_the_past() -> None:
    network = TrajectoryNetwork(transformer(), hidden=(8,))
    aim, seen = torch.zeros(3, 2), past()
    way, states = network(seen, aim)
    assert way.shape == (3, 12, 2)
    assert states.shape == (3, 12, 16)
    assert not torch.isclose(way, network(seen, aim + 1)[0]).all(2).any()
    moved = seen.clone()
    moved[:, 7] += 1
    assert not torch.isclose(way, network(moved, aim)[0]).all(2).any()


def test_the_last_step_is_a_difference_from_the_destination() -> None:
    network = TrajectoryNetwork(transformer(), hidden=(8,))
    for parameter in network.last[-1].parameters():
        torch.nn.init.zeros_(parameter)
    aim = torch.tensor([[3.0, -2], [0, 1], [5, 5]])
    assert torch.equal(network(past(), aim)[0][:, -1], aim)


def test_the_query_stands_just_before_the_last_position() -> None:
    seen: list[torch.Tensor] = []
    network = DestinationNetwork(transformer(), count=4, hidden=(8,))
    network.transformer.place.register_forward_hook(lambda module, given, out: seen.append(given[0] + 1))
    destinations, state = network(past())
    assert destinations.shape == (3, 4, 2)
    assert state.shape == (3, 16)
    TrajectoryNetwork(network.transformer, hidden=(8,))(past(), torch.zeros(3, 2))
    assert [places.tolist() for places in seen] == [[1, 2, 3, 4, 5, 6, 7, 8, 19], list(range(1, 21))]


def test_stage_three_begins_with_the_transformer_and_copies_of_the_query() -> None:
    source = DestinationNetwork(transformer(0), hidden=(8,))
    network = TrajectoryNetwork(transformer(1), hidden=(8,))
    network.inherit(source)
    assert all(torch.equal(prompt, source.head.query[0, 0]) for prompt in network.prompts[0])
    assert network.prompts.shape == (1, 11, 16)
    assert torch.equal(network.project.weight, source.head.project.weight)
    for mine, theirs in zip(network.transformer.parameters(), source.transformer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine is not theirs
    torch.nn.init.ones_(source.transformer.norm.weight.data.mul_(2))
    with torch.no_grad():
        source.transformer.embed.weight.add_(1)
    assert not torch.equal(network.transformer.embed.weight, source.transformer.embed.weight)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="DestinationNetwork: 0 destinations in 12 steps; expected at least 1 of each"):
        DestinationNetwork(transformer(), count=0)
    with pytest.raises(ValueError, match="TrajectoryNetwork: future is 2, expected at least 3"):
        TrajectoryNetwork(transformer(), future=2)
