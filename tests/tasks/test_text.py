"""Text rows: files, tables, templates that read knobs, and budgets that prompt and judge share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from regimen import Cast, Knob, Knobs, Regimen, Stage
from regimen.controllers import Exponential, Schedule
from regimen.iteration import Counters, StageRun
from regimen.rewards import Scene
from regimen.rewards.text import LengthReward
from regimen.rollout import Rollout
from regimen.tasks.text import (
    TextEvaluator,
    TextPromptTask,
    read_dataset,
    read_json_lines,
    render,
    row_key,
    split_rows,
    text_table,
)

BUDGET = Knob("token_budget", 48, low=1, integer=True)
ROWS = [{"question": f"{n} + 1", "answer": n + 1} for n in range(5)]


class Speaker:
    """A policy that answers every prompt with what a function says, a word a step."""

    knobs = ()

    def __init__(self, say: Callable[[str], str] = lambda prompt: prompt) -> None:
        self.say, self.seen = say, list[TensorDict]()

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        self.seen.append(contexts)
        texts = [self.say(prompt) for prompt in contexts["prompt"]]
        lengths = torch.tensor([len(text.split()) for text in texts])
        return Rollout.create(
            task="policy", group=torch.arange(len(texts)), mask=torch.arange(int(lengths.max())) < lengths[:, None],
            context=contexts, knobs=knobs, columns={"text": texts},
        )  # fmt: skip


# Files


def test_json_lines_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # U+2028 separates lines to str.splitlines, and may stand inside a JSON string.
    path.write_text('{"q": "caf\u00e9 \u2028 two"}\n\n  \n{"q": "b"}\r\n', encoding="utf-8")
    assert read_json_lines(path) == [{"q": "café \u2028 two"}, {"q": "b"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q": 1}\n\n{"q": \n', r"rows\.jsonl, line 3: not JSON \(Expecting value at column 7\); .* repair or remove"),
        ('{"q": 1}\n[1, 2]\n', r"rows\.jsonl, line 2: a list, expected an object such as"),
        ("\n \n", r"rows\.jsonl has no rows; expected one JSON object per line"),
    ],
)
def test_a_bad_line_is_named_with_its_number(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json_lines(tmp_path / "rows.jsonl")


def test_rows_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, lines = tmp_path / "data", "\n".join(json.dumps(row) for row in ROWS)
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text(lines.splitlines()[0])
    assert read_dataset(str(folder)) == ROWS
    assert read_dataset(str(folder), split="test") == ROWS[:1]
    assert read_dataset(str(folder), split="train[:2]") == ROWS[:2]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets: pip install 'regimen-rl\[datasets\]'$"):
        read_dataset("openai/gsm8k")


# Tables


def test_every_kind_of_field_becomes_a_column() -> None:
    table = text_table(
        [
            {"n": 1, "x": 1, "b": True, "t": "a", "l": [1, "é"], "m": {"k": 1}, "i": torch.zeros(2)},
            {"n": 2, "x": 0.5, "b": False, "t": "b", "l": [], "m": {}, "i": torch.ones(2)},
        ]
    )
    assert table.batch_size == torch.Size([2])
    assert (table["n"].dtype, table["x"].dtype, table["b"].dtype) == (torch.int64, torch.float64, torch.bool)
    assert table["x"].tolist() == [1.0, 0.5]
    assert list(table["t"]) == ["a", "b"]
    assert list(table["l"]) == ['[1, "é"]', "[]"]
    assert list(table["m"]) == ['{"k": 1}', "{}"]
    assert table["i"].tolist() == [[0, 0], [1, 1]]
    assert sorted(text_table(ROWS, ["answer"]).keys()) == ["answer", "row_key"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "text_table was given no rows"),
        ([{"q": "a"}, {"q": None}], "field 'q' is null in row 1, which has q; fill it, drop the row, or name"),
        ([{"q": "a", "r": 1}, {"q": "b"}], "field 'r' is missing in row 1"),
        ([{"q": "a"}, {"q": "b", "r": 1}], "field 'r' is missing in row 0"),
        ([{"q": "a"}, {"q": 2}], "field 'q' holds values of kinds int, str; expected one kind"),
        ([{"q": True}, {"q": 2}], "field 'q' holds values of kinds bool, int"),
        ([{"q": 2**70}], "field 'q' does not fit a column .* numbers within int64"),
        ([{"q": torch.zeros(1)}, {"q": torch.zeros(2)}], "field 'q' does not fit a column .* tensors of one shape"),
        ([{"q": object()}], "field 'q' does not fit a column"),
        ([{"q": 1.0}, {"q": float("nan")}], r"column 'q' holds values that are not finite in 1 rows \(\[1\]\)"),
    ],
)
def test_rows_that_make_no_table_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_table(rows)


def test_null_in_a_field_that_is_not_kept_does_no_harm() -> None:
    assert list(text_table([{"q": "a", "hint": None}], ["q"])["q"]) == ["a"]


def test_row_key_is_of_the_content_alone() -> None:
    assert row_key({"a": 1, "b": "é"}) == row_key({"b": "é", "a": 1}) == 1910862988768385205
    assert row_key({"a": 1}) != row_key({"a": "1"})
    assert row_key({"a": torch.tensor([1, 2])}) == row_key({"a": [1, 2]})
    keys = [row_key({"n": n}) for n in range(200)]
    assert len(set(keys)) == 200
    assert all(0 <= key < 2**63 for key in keys)


def test_split_holds_out_about_the_share_by_content() -> None:
    rows = [{"question": f"q{n}", "n": n} for n in range(2000)]
    train, held = split_rows(rows, 0.25)
    # Binomial deviation: sqrt(2000 * 0.25 * 0.75) = 19.
    assert abs(len(held) - 500) < 5 * 19
    assert sorted(train + held, key=lambda row: row["n"]) == rows
    assert split_rows(rows[::-1], 0.25)[1] == held[::-1]
    alike = [{"question": "same", "n": n} for n in range(50)]
    assert 0 in map(len, split_rows(alike, 0.5, by="question"))
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"share {share}, expected a number between 0 and 1"):
            split_rows(rows, share)


# Templates


def test_templates_read_fields_and_knobs() -> None:
    rows = text_table([{"q": "why", "x": 1, "i": torch.zeros(2)}, {"q": "{who}", "x": 2.5, "i": torch.ones(2)}])
    knobs = {"token_budget": 24.0, "temperature": 0.5}
    found = render("{q} {x} {token_budget:03d} {temperature} {{x}}", rows, knobs)
    assert found == ["why 1 024 0.5 {x}", "{who} 2.5 024 0.5 {x}"]
    written = render(lambda row, knobs: f"{row['q'].upper()} {knobs['token_budget'] + 1}", rows, knobs)
    assert written == ["WHY 25", "{WHO} 25"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{question} in {token_budgte}",
            r"task 'ask': the template names '\{token_budgte\}', which is neither a field ",
        ),
        ("{question} {budget.size}", r"names '\{budget\}'.* nor a knob \(token_budget\); declare a knob with reads="),
        ("{}", r"names '\{\}', which is neither a field \(answer, image, question\)"),
        ("{row_key}", r"names '\{row_key\}'"),
        ("{question", "expected '}' before end of string; write literal braces twice"),
        ("} {question}", "Single '}' encountered"),
    ],
)
def test_templates_that_name_what_is_not_there_are_refused(template: str, message: str) -> None:
    rows = [{**row, "image": "file"} for row in ROWS]
    with pytest.raises(ValueError, match=message):
        TextPromptTask("ask", rows, template, reads=[BUDGET])


def test_a_field_of_many_numbers_is_not_for_prompts() -> None:
    with pytest.raises(ValueError, match=r"names '\{image\}', which is neither a field \(question\)"):
        TextPromptTask("ask", [{"question": "a", "image": torch.zeros(3)}], "{image}")


def test_a_field_and_a_knob_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="task 'ask': 'answer' is a field of the rows and a knob; rename the field"):
        TextPromptTask("ask", ROWS, reads=[Knob("answer", 1)])


# Tasks


def test_prompts_are_asked_and_fields_become_columns(rng: torch.Generator) -> None:
    rows = [{**row, "image": torch.full((2,), float(row["answer"]))} for row in ROWS]
    task = TextPromptTask(
        "ask", rows, "{question} in {token_budget}", reads=[BUDGET], shown=["image"], group_size=2, order="sequential"
    )
    assert task.knobs == (BUDGET,)
    policy = Speaker(lambda prompt: f"answer to {prompt}")
    rollout = task.collect({"policy": policy}, Knobs.of(task), rng, 4)
    assert list(rollout.context["prompt"]) == ["0 + 1 in 48"] * 2 + ["1 + 1 in 48"] * 2
    assert sorted(policy.seen[0].keys()) == ["image", "prompt"]
    assert list(rollout["text"])[2] == "answer to 1 + 1 in 48"
    assert rollout["answer"].tolist() == [1, 1, 2, 2]
    assert rollout["row_key"].unique_consecutive().tolist() == task.rows["row_key"][:2].tolist()
    assert rollout.group.tolist() == [0, 0, 1, 1]
    assert rollout.task_names == ("ask",)


def test_a_field_named_like_a_column_of_the_policy_is_refused(rng: torch.Generator) -> None:
    task = TextPromptTask("ask", [{"question": "a", "text": "b"}])
    with pytest.raises(ValueError, match="the policy gives a column 'text' itself; rename this field"):
        task.collect({"policy": Speaker()}, {}, rng, 1)


def test_resume_in_the_middle_of_an_epoch_asks_the_same_prompts(rng: torch.Generator) -> None:
    task, again = (TextPromptTask("ask", ROWS) for _ in range(2))
    cast = {"policy": Speaker()}
    task.collect(cast, {}, rng, 3)
    state, at = task.state_dict(), rng.get_state()
    expected = [list(task.collect(cast, {}, rng, 3)["question"]) for _ in range(3)]
    again.load_state_dict(state)
    stream = torch.Generator()
    stream.set_state(at)
    assert [list(again.collect(cast, {}, stream, 3)["question"]) for _ in range(3)] == expected


def test_prompt_and_judge_have_one_budget_when_the_knob_changes() -> None:
    """Train Long, Think Short: 48, 38, 30, 24, the factor (24 / 48)^(1/3) at every second iteration."""
    judged: list[tuple[list[str], list[float]]] = []

    class Recording(LengthReward):
        def score(self, rollout: Rollout, scene: Scene) -> torch.Tensor:
            value = super().score(rollout, scene)
            judged.append((list(rollout.context["prompt"]), value.tolist()))
            return value

    policy = Speaker(lambda prompt: "word " * 30)
    task = TextPromptTask("ask", ROWS, "{question} Use exactly {token_budget} tokens.", reads=[BUDGET], group_size=2)
    schedule = Schedule("token_budget", Exponential(48, 0.5 ** (1 / 3), every=2, staircase=True, floor=1))
    stage = Stage("s", [task], 8, 4, reward=Recording(), controllers=[schedule])
    run = StageRun(Regimen(Cast(policy=policy), [stage]), stage)
    run.start(fresh=True)
    rng = torch.Generator().manual_seed(0)
    metrics = [run.iterate(step, Counters(), rng) for step in range(8)]
    stated = [int(prompts[0].split()[-2]) for prompts, _ in judged]
    assert stated == [48, 48, 38, 38, 30, 30, 24, 24]
    assert [m["knob/token_budget"] for m in metrics] == stated
    for (prompts, values), budget in zip(judged, stated, strict=True):
        assert all(prompt.endswith(f"Use exactly {budget} tokens.") for prompt in prompts)
        assert values == pytest.approx([1 - abs(30 - budget) / budget] * 4)


def test_a_budget_that_changes_after_sampling_does_not_change_the_judgement(rng: torch.Generator) -> None:
    task = TextPromptTask("ask", ROWS, "{question} {token_budget}", reads=[BUDGET])
    board = Knobs.of(task)
    rollout = task.collect({"policy": Speaker(lambda prompt: "word " * 24)}, board, rng, 2)
    board.set("token_budget", 24, by="a test")
    assert LengthReward().score(rollout, Scene(knobs=board)).tolist() == [0.5, 0.5]


# Evaluation


def right(rollout: Rollout) -> torch.Tensor:
    given = torch.tensor([int(text.split()[-1]) for text in rollout["text"]])
    return given == rollout["answer"]


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_evaluation_is_the_mean_over_all_rows(batch_size: int, rng: torch.Generator) -> None:
    # It always answers 3: right in one row of five.
    policy = Speaker(lambda prompt: f"{prompt} -> 3")
    evaluator = TextEvaluator(
        ROWS, "{question} {token_budget}", {"accuracy": right, "length": lambda r: r.lengths},
        knobs={"token_budget": 24}, samples=3, batch_size=batch_size,
    )  # fmt: skip
    evaluation = evaluator(policy, {"token_budget": 48.0, "temperature": 1.0}, rng)
    assert evaluation.metrics == pytest.approx({"accuracy": 0.2, "length": 6.0})
    assert evaluation.samples["answers"] == [f"{n} + 1 24\n{n} + 1 24 -> 3" for n in range(3)]


def test_a_task_evaluates_with_its_evaluator(rng: torch.Generator) -> None:
    evaluator = TextEvaluator(ROWS, "{question}", {"accuracy": right})
    task = TextPromptTask("ask", ROWS, evaluate=evaluator)
    cast = {"policy": Speaker(lambda prompt: str(int(prompt.split()[0]) + 1))}
    assert task.evaluate(cast, {}, rng).metrics == {"accuracy": 1.0}


def test_an_evaluator_names_a_knob_that_is_not_in_force(rng: torch.Generator) -> None:
    evaluator = TextEvaluator(ROWS, "{question} {token_budget}", {"accuracy": right})
    with pytest.raises(ValueError, match=r"TextEvaluator: the template names '\{token_budget\}'"):
        evaluator(Speaker(), {"temperature": 1.0}, rng)


def test_a_field_hides_a_knob_of_its_name_from_an_evaluator(rng: torch.Generator) -> None:
    """A generator's difficulty may be called as one of its rows' fields is."""
    evaluator = TextEvaluator(ROWS, "{answer}", {"accuracy": right})
    assert evaluator(Speaker(), {"answer": 7.0}, rng).metrics == {"accuracy": 1.0}


def test_texts_stay_in_a_checkpointed_rollout(rng: torch.Generator) -> None:
    rollout = TextPromptTask("ask", ROWS).collect({"policy": Speaker()}, {}, rng, 2)
    again = Rollout.from_state_dict(rollout.state_dict())
    assert list(again["question"]) == list(rollout["question"])
    assert isinstance(again.columns.get("question"), NonTensorStack)
