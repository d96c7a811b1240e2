"""Row orders, and their exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from regimen.storage import load_tree, save_tree
from regimen.tasks.rows import Order, RowReader, check_finite


def drawn(reader: RowReader, counts: list[int], rng: torch.Generator) -> list[int]:
    return [row for count in counts for row in reader.draw(count, rng).tolist()]


def test_shuffled_epochs_show_every_row_once(rng: torch.Generator) -> None:
    rows = drawn(RowReader(7, "shuffle", "a"), [3, 5, 1, 12], rng)
    epochs = [rows[start : start + 7] for start in range(0, 21, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_how_rows_are_asked_for_does_not_change_them() -> None:
    one, many = ([torch.Generator().manual_seed(3), RowReader(7, "shuffle", "a")] for _ in range(2))
    assert drawn(one[1], [21], one[0]) == drawn(many[1], [1] * 21, many[0])


def test_sequence_starts_again_at_its_end(rng: torch.Generator) -> None:
    before = rng.get_state()
    assert drawn(RowReader(3, "sequential", "a"), [2, 2, 4], rng) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(rng.get_state(), before), "a sequence must not use the random stream"


def test_random_rows_are_uniform_and_repeat(rng: torch.Generator) -> None:
    rows = RowReader(4, "random", "a").draw(4000, rng)
    counts = torch.bincount(rows, minlength=4)
    # Binomial deviation: sqrt(4000 * 0.25 * 0.75) = 27.
    assert ((counts - 1000).abs() < 5 * 27).all()
    assert len(set(rows[:5].tolist())) < 5


@pytest.mark.parametrize("order", ["shuffle", "random", "sequential"])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_rows(order: Order, tmp_path: Path) -> None:
    rng, reader = torch.Generator().manual_seed(1), RowReader(10, order, "a")
    reader.draw(4, rng)
    save_tree(tmp_path / "state", {"reader": reader.state_dict(), "rng": rng.get_state()})
    expected = drawn(reader, [3, 3, 3], rng)
    state = load_tree(tmp_path / "state")
    again, stream = RowReader(10, order, "a"), torch.Generator()
    again.load_state_dict(state["reader"])
    stream.set_state(state["rng"])
    assert drawn(again, [3, 3, 3], stream) == expected


def test_state_is_what_is_left_of_the_epoch_and_no_longer_moves(rng: torch.Generator) -> None:
    reader = RowReader(5, "sequential", "a")
    reader.draw(3, rng)
    state = reader.state_dict()
    reader.draw(2, rng)
    assert state["queue"].tolist() == [3, 4]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="task 'a' has no rows to draw from"):
        RowReader(0, "shuffle", "a")
    with pytest.raises(ValueError, match="task 'a': order 'sorted' is not one of shuffle, random, sequential"):
        RowReader(3, "sorted", "a")  # type: ignore[arg-type]


def test_rows_of_another_data_set_are_refused(rng: torch.Generator) -> None:
    reader = RowReader(10, "shuffle", "a")
    reader.draw(1, rng)
    with pytest.raises(ValueError, match=r"task 'a'.*row 9.*has 5 rows"):
        RowReader(5, "shuffle", "a").load_state_dict(reader.state_dict())


def test_numbers_that_are_not_finite_are_refused_with_column_and_rows() -> None:
    value = torch.zeros(12, 2, 3)
    value[1, 0, 2], value[7, 1, 0] = torch.nan, torch.inf
    # Of a permuted tensor there is no view as rows.
    table = TensorDict({"context": {"x": value.permute(0, 2, 1)}, "n": torch.arange(12)}, batch_size=[12])
    with pytest.raises(ValueError, match=r"task 'a': column 'context/x' .* not finite in 2 rows \(\[1, 7\]\); drop"):
        check_finite(table, "task 'a'")
    many = TensorDict({"x": torch.full((8,), torch.nan)}, batch_size=[8])
    with pytest.raises(ValueError, match=r"'x' .* in 8 rows \(\[0, 1, 2, 3, 4\] \.\.\.\)"):
        check_finite(many, "b")
