"""A judge behind an endpoint: what is sent, what is read, and what happens when the server misbehaves."""

from __future__ import annotations

import builtins
import email.utils
import json
import logging
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.rewards import FAILED, SCORED, EndpointReward, JudgeReport, Scene, judge
from regimen.rewards.endpoint import LastNumber, Retries
from regimen.rollout import Rollout
from regimen.runs import describe

httpx = pytest.importorskip("httpx")

Build = Callable[..., Rollout]
Answer = tuple[int, dict[str, str], str | Iterator[str]]
KEY = "sk-secret-0123456789"


def verdict(text: Any, finish_reason: str = "stop") -> Answer:
    """A response with a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


class Service:
    """A local server. `answer(question, times)` decides on each request; `times` counts those with this question."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Answer] = lambda question, times: verdict("7")
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.closing, lock = threading.Event(), threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    service.requests.append((self.path, dict(self.headers), body))
                    times = service.asked().count(question)
                status, headers, content = service.answer(question, times)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(str(content))), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in content:
                    self.wfile.write(part.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, _, body in self.requests]

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("NO_PROXY", "*")
    service = Service()
    yield service
    service.close()


@pytest.fixture
def scored(service: Service, tiny_rollout: Build) -> Callable[..., tuple[list[Any], JudgeReport]]:
    """`scored(texts, **options)`: the values, with "failed" where a sample failed; all are one group."""

    def score(texts: Sequence[str], **options: Any) -> tuple[list[Any], JudgeReport]:
        settings = {"retries": Retries(attempts=3, first_wait_s=0.01), "timeout_s": 5.0, **options}
        reward = EndpointReward(service.url, "a-model", settings.pop("template", "{text}"), **settings)
        rollout = tiny_rollout(len(texts), columns={"text": list(texts)})
        judged, report = judge(reward, rollout, Scene(knobs=Knobs.of(reward)))
        outcomes = zip(judged.rewards["judge"].tolist(), judged.status["judge"].tolist(), strict=True)
        return [round(value, 6) if status == SCORED else "failed" for value, status in outcomes], report

    return score


def test_each_sample_is_asked_about_and_gets_its_own_verdict(service: Service, scored: Any) -> None:
    service.answer = lambda question, times: verdict(f"I would say {question.split()[-1]}/10.")
    values, report = scored(["3", "9", "0", "10"], template="Condition {condition}, answer {text}", system="Be strict.")
    assert values == [0.3, 0.9, 0.0, 1.0]
    assert report.failed == 0
    path, headers, body = next(request for request in service.requests if "answer 9" in str(request))
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body == {
        "model": "a-model",
        "messages": [
            {"role": "system", "content": "Be strict."},
            {"role": "user", "content": "Condition 0, answer 9"},
        ],
        "temperature": 0,
    }


def test_braces_in_an_answer_are_left_alone(service: Service, scored: Any) -> None:
    scored(["{text} {0} {{"], template="<{text}> {{}}")
    assert service.asked() == ["<{text} {0} {{> {}"]


def test_a_function_may_write_the_questions_and_options_are_sent(service: Service, scored: Any) -> None:
    scored(["a", "b"], template=lambda rollout: [text.upper() for text in rollout["text"]], options={"temperature": 1})
    assert sorted(service.asked()) == ["A", "B"]
    assert service.requests[0][2]["temperature"] == 1
    values, report = scored(["a", "b"], template=lambda rollout: ["one"])
    assert values == ["failed"] * 2
    assert "the template gave 1 texts for 2 samples" in report.errors[0]


def test_a_missing_column_is_named_with_those_there_are(scored: Any) -> None:
    values, report = scored(["a"], template="{question}")
    assert values == ["failed"]
    assert "no column or context entry 'question'; it has: condition, text" in report.errors[0]


@pytest.mark.parametrize(
    "first",
    [
        (500, {}, "broken"),
        (503, {}, ""),
        (408, {}, ""),
        (429, {"Retry-After": "0"}, ""),
        (200, {}, "<html>"),
        (200, {}, "{}"),
        (200, {}, '{"choices": []}'),
        (200, {}, "[1]"),
        (200, {"Content-Encoding": "gzip"}, "not gzip"),
        (200, {"Content-Length": "999"}, "cut short"),
    ],
)
def test_what_may_pass_is_tried_again(service: Service, scored: Any, first: Answer) -> None:
    service.answer = lambda question, times: first if times == 1 and question == "a" else verdict("8")
    values, report = scored(["a", "b"])
    assert values == [0.8, 0.8]
    assert report.errors == ()
    assert sorted(service.asked()) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("always", "why"),
    [
        ((500, {}, "out of\n memory"), "the request failed 3 times, at last: status 500: out of memory"),
        ((200, {}, "<html>"), "the request failed 3 times, at last: the answer is no chat completion: <html>"),
        ((200, {"Content-Length": "99"}, "{"), "the request failed 3 times, at last: RemoteProtocolError: "),
    ],
)
def test_what_does_not_pass_fails_its_sample_only(service: Service, scored: Any, always: Answer, why: str) -> None:
    service.answer = lambda question, times: always if question == "b" else verdict("8")
    values, report = scored(["a", "b", "c"])
    assert values == [0.8, "failed", 0.8]
    assert report.errors[0].startswith(f"reward 'judge', sample 1: {why}")
    assert service.asked().count("b") == 3


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((400, {}, "too long"), "the request failed: status 400: too long"),
        ((401, {}, ""), "the request failed: status 401:"),
        ((302, {"Location": "/v2"}, ""), "the request failed: status 302:"),
        (verdict(None, "content_filter"), "the request failed: the answer has no text (finish_reason content_filter)"),
        (verdict("Well done!"), "there is no verdict in the answer: Well done!"),
        (verdict("11"), "there is no verdict in the answer: 11"),
    ],
)
def test_what_would_not_pass_is_not_tried_again(service: Service, scored: Any, answer: Answer, why: str) -> None:
    service.answer = lambda question, times: answer
    values, report = scored(["a"])
    assert values == ["failed"]
    assert report.errors == (f"reward 'judge', sample 0: {why}",)
    assert len(service.requests) == 1


def test_a_server_that_never_answers_is_given_up(service: Service, scored: Any) -> None:
    def answer(question: str, times: int) -> Answer:
        if question == "b":
            service.closing.wait(20)
        return verdict("8")

    service.answer = answer
    values, report = scored(["a", "b"], timeout_s=0.5, retries=Retries(attempts=2, first_wait_s=0.01))
    assert values == [0.8, "failed"]
    assert report.errors[0].startswith("reward 'judge', sample 1: the request failed 2 times, at last: ReadTimeout")


def test_a_server_that_dribbles_is_given_up(service: Service, scored: Any) -> None:
    def forever() -> Iterator[str]:
        while not service.closing.wait(0.02):
            yield " "

    service.answer = lambda question, times: (200, {"Content-Length": "999999"}, forever())
    values, report = scored(["a"], timeout_s=0.3, retries=Retries(attempts=1))
    assert values == ["failed"]
    assert "ReadTimeout" in report.errors[0]


def test_no_server_is_a_failure_that_is_told(tiny_rollout: Build) -> None:
    reward = EndpointReward("http://127.0.0.1:9", "m", "{text}", retries=Retries(attempts=1))
    score = reward.score(tiny_rollout(columns={"text": ["a"] * 6}), Scene())
    assert score.status.tolist() == [FAILED] * 6
    assert score.errors[0].startswith("reward 'judge', sample 0: the request failed 1 times, at last: ConnectError")


def test_retry_after_is_honoured(service: Service, scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Patient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    headers = {"a": "20", "b": soon, "c": "nonsense", "d": "61"}
    service.answer = lambda question, times: (
        (429, {"Retry-After": headers[question]}, "slow down") if times == 1 else verdict("8")
    )
    for question in "abcd":
        reward = EndpointReward(service.url, "m", "{text}", retries=Retries(first_wait_s=0.01))
        with httpx.Client() as client:
            outcome = reward._verdict(client, Patient(), question)
        assert outcome == 0.8 or outcome.why == (
            "the request failed, and the server asks to wait 61 s: status 429: slow down"
        )
    assert waits[0] == 20
    assert 25 < waits[1] <= 30
    assert 0.005 <= waits[2] <= 0.01
    assert len(waits) == 3


def test_waits_double_up_to_a_longest_and_are_shortened_by_up_to_a_half() -> None:
    retries = Retries(first_wait_s=1.0, longest_wait_s=5.0)
    for attempt, full in enumerate((1.0, 2.0, 4.0, 5.0, 5.0), start=1):
        waits = [retries.wait_s(attempt) for _ in range(50)]
        assert full / 2 <= min(waits) < max(waits) <= full
    assert retries.wait_s(1, asked_s=4.0) == 4.0


def test_waiting_and_judging_draw_from_no_stream_of_the_run(service: Service, scored: Any) -> None:
    service.answer = lambda question, times: (500, {}, "") if times == 1 else verdict("8")
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
    assert scored(["a", "b"])[0] == [0.8, 0.8]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_requests_run_at_the_same_time_but_not_too_many_and_keep_their_order(service: Service, scored: Any) -> None:
    meeting, lock, running = threading.Barrier(4), threading.Lock(), [0, 0]

    def answer(question: str, times: int) -> Answer:
        with lock:
            running[:] = running[0] + 1, max(running[1], running[0] + 1)
        # Nobody goes on before four are here, and those that were asked first answer last.
        meeting.wait(20)
        time.sleep(0.005 * (8 - int(question)))
        with lock:
            running[0] -= 1
        return verdict(question)

    service.answer = answer
    values, _ = scored([str(i) for i in range(8)], at_once=4)
    assert values == [i / 10 for i in range(8)]
    assert running == [0, 4]


def test_a_time_limit_of_the_stage_ends_the_wait(service: Service, tiny_rollout: Build) -> None:
    service.answer = lambda question, times: (500, {}, "")
    patience = Retries(attempts=100, first_wait_s=30.0)
    reward = EndpointReward(service.url, "m", "{text}", retries=patience, at_once=2)
    started = time.monotonic()
    score = reward.judge(tiny_rollout(columns={"text": ["a"] * 6}), Scene(timeout_s=0.3)).components["judge"]
    assert time.monotonic() - started < 10
    assert score.errors == ("reward 'judge' did not return within 0.3 s",)


@pytest.mark.parametrize("repeats", ["Incorrect API key: {key}", "x" * 190 + " {key}", "{key}{key}"])
def test_the_key_is_sent_and_nowhere_shown(
    service: Service, scored: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, repeats: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    service.answer = lambda question, times: (401, {}, repeats.format(key=KEY))
    values, report = scored(["a"], key_from="JUDGE_KEY")
    assert values == ["failed"]
    assert service.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert "status 401" in report.errors[0]
    assert "secret" not in report.errors[0]
    assert "secret" not in caplog.text


def test_the_key_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    reward = EndpointReward("http://localhost:8000/v1/", "m", "{text}", key_from="JUDGE_KEY", timeout_s=3, at_once=2)
    described = describe(reward)
    assert (
        json.loads(json.dumps(described))
        == described
        == {
            "type": "EndpointReward",
            "version": 1,
            "url": "http://localhost:8000/v1",
            "model": "m",
            "template": "{text}",
            "system": None,
            "parse": {"type": "LastNumber", "low": 0.0, "high": 10.0},
            "key_from": "JUDGE_KEY",
            "name": "judge",
            "options": {"temperature": 0},
        }
    )
    assert KEY not in repr(vars(reward))
    assert KEY.encode() not in pickle.dumps(reward)


@pytest.mark.parametrize(("value", "what"), [(None, "is not set"), ("", "is not set"), ("a b", "holds blanks or odd")])
def test_a_missing_or_odd_key_fails_all_and_names_the_variable(
    service: Service, scored: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, what: str
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    values, report = scored(["a", "b"], key_from="JUDGE_KEY")
    assert values == ["failed"] * 2
    assert f"the environment variable JUDGE_KEY {what}" in report.errors[0]
    assert "a b" not in report.errors[0]
    assert service.requests == []


def test_a_parser_of_ones_own(service: Service, scored: Any) -> None:
    service.answer = lambda question, times: verdict(question)

    def yes(reply: str) -> float | None:
        return {"yes": 1.0, "no": 0.0, "unsure": None, "odd": float("nan")}[reply]

    values, report = scored(["yes", "no", "unsure", "odd", "other"], parse=yes)
    assert values == [1.0, 0.0, "failed", "failed", "failed"]
    assert report.errors == (
        "reward 'judge', sample 2: there is no verdict in the answer: unsure",
        "reward 'judge', sample 3: there is no verdict in the answer: odd",
        "reward 'judge', sample 4: the parser raised KeyError: 'other'; the answer was: other",
    )


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("8", 0.8),
        ("Between 2 and 5, so: **4**", 0.4),
        ("Score: 7.5/10.", 0.75),
        ("9 out of 10!", 0.9),
        ("10 / 10", 1.0),
        ("4/5", None),
        ("85", None),
        ("-1", None),
        ("none", None),
        ("", None),
        ("gpt4 says the 2nd", None),
        ("1,000", None),
        ("from 1-8", 0.8),
    ],
)
def test_the_last_number_of_a_reply(reply: str, number: float | None) -> None:
    assert LastNumber()(reply) == number


def test_a_scale_of_ones_own() -> None:
    assert LastNumber(1, 5)("I give 4/5") == 0.75
    assert LastNumber(-1, 1)("-1") == 0.0


def test_passes_the_checker(service: Service, tiny_rollout: Build) -> None:
    service.answer = lambda question, times: verdict(question)
    reward = EndpointReward(service.url, "m", "{text}")
    result = check(reward, tiny_rollout(columns={"text": list("123456")}))
    assert result.ok, str(result)


def test_without_httpx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "httpx":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"EndpointReward needs httpx: pip install 'regimen-rl\[endpoint\]'"):
        EndpointReward("http://localhost/v1", "m", "{text}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000', expected one such as http://localhost:8000/v1"),
        ({"url": "https://user:hunter2@host/v1"}, "the url holds a user name, a password or a query"),
        ({"url": "https://host/v1?key=hunter2"}, "the url holds a user name, a password or a query"),
        ({"key_from": "sk-hunter2"}, "key_from is not the name of an environment variable"),
        ({"template": "Is it good?"}, r"should name columns in braces, such as \{text\}"),
        ({"template": "{} {text}"}, "should name columns in braces"),
        ({"template": "{text"}, "expected '}' before end of string; write literal braces twice"),
        ({"timeout_s": 0}, "timeout_s is 0, at_once 8; expected above 0"),
        ({"at_once": 0}, "at_once 0; expected above 0"),
    ],
)
def test_bad_settings_are_refused_without_showing_secrets(settings: dict[str, Any], message: str) -> None:
    given = {"url": "http://localhost/v1", "model": "m", "template": "{text}", **settings}
    with pytest.raises(ValueError, match=message) as caught:
        EndpointReward(**given)
    assert "hunter2" not in str(caught.value)


def test_bad_retries_are_refused() -> None:
    with pytest.raises(ValueError, match="Retries.*attempts=0.*expected at least one attempt"):
        Retries(attempts=0)
