"""A judge behind an OpenAI-compatible chat endpoint: a prompt about each sample, answered by a number."""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

from regimen.rewards.base import Reward, Scene, Score
from regimen.rewards.text import Failure, field_of, score_each
from regimen.rollout import Rollout

_NUMBER = re.compile(
    r"(?<![\w.])(?<!\d,)([-+]?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?(?![\w]|[.,]\d)", re.IGNORECASE
)
# Busy or broken for now: request time-out, too early, too many requests, and what goes wrong in a server.
_PASSING = (408, 425, 429)
_SHOWN = 200


@dataclass(frozen=True)
class LastNumber:
    """The last number in a judge's reply, from a scale to [0, 1].

    `8`, `8.5`, `8/10` and `8 out of 10` are read. There is no number where the last one is off the scale, or of
    another scale (`4/5`): a verdict that has to be guessed is none.
    """

    low: float = 0.0
    high: float = 10.0

    def __call__(self, reply: str) -> float | None:
        """The number `x` as `(x - low) / (high - low)`; `None` if there is none."""
        found = _NUMBER.findall(reply)
        if not found:
            return None
        value, top = found[-1]
        if not self.low <= float(value) <= self.high or (top and float(top) != self.high):
            return None
        return (float(value) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Retries:
    """When a request is tried again: after a broken connection, a time-out, a passing status or a garbled answer.

    The wait doubles from the first on, each time shortened by a random share of up to a half, so that requests that
    failed together do not come back together. A server that asks for more (`Retry-After`) gets it.

    Attributes:
        attempts: of one request, the first included.
        first_wait_s: after the first attempt.
        longest_wait_s: between two of them; a server that asks for more is not asked again.
    """

    attempts: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait_s <= 0 or self.longest_wait_s <= 0:
            raise ValueError(f"{self}: expected at least one attempt, and waits above 0 seconds")

    def wait_s(self, attempt: int, asked_s: float = 0.0) -> float:
        """Seconds to wait after an attempt, counted from 1, if the server asked for `asked_s` or more."""
        # From the operating system: no random stream of the run is touched.
        shortened = 1 - random.SystemRandom().random() / 2
        return max(asked_s, min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1)) * shortened)


class EndpointReward(Reward):
    """A chat model's verdict on each sample, `[B]`, component `judge`.

    Every sample is one request to `<url>/chat/completions`. A sample whose request fails, after retries where these
    may help, or whose answer has no verdict in it, has *failed*, with the reason; it is never worth 0 for that.

    The judge reads what the policy wrote, and a policy may learn to talk to its judge: mark in the template where the
    answer begins and ends, and evaluate with something else. Extra `endpoint`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str | Callable[[Rollout], Sequence[str]],
        *,
        parse: Callable[[str], float | None] | None = None,
        system: str | None = None,
        key_from: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
        at_once: int = 8,
        name: str = "judge",
    ) -> None:
        """Make the reward. Nothing is sent before the first batch.

        Args:
            url: of the service, such as `http://localhost:8000/v1`.
            model: as the service calls it.
            template: the question about a sample, which names columns or context entries in braces (`"Question:
                {prompt} Answer: {text} Grade the answer from 0 to 10."`); or a function, rollout -> `B` texts.
            parse: a reply to a number, or to `None` where there is none in it; `LastNumber()` by default.
            system: system message.
            key_from: the environment variable that holds the API key. The key itself is neither kept nor shown.
            options: more fields of the request; `temperature` is 0 unless it is given.
            timeout_s: seconds for one attempt, looked at whenever something arrives or nothing has for so long.
            retries: see `Retries`.
            at_once: requests under way at one time.
            name: of the component.

        Raises:
            ImportError: `httpx` is not installed.
            ValueError: an address that is none or that holds a secret, a `key_from` that is no name, a template that
                names no column, or a number that is not above 0.
        """
        _httpx()
        _check_address(url, key_from)
        if timeout_s <= 0 or at_once < 1:
            raise ValueError(f"EndpointReward: timeout_s is {timeout_s}, at_once {at_once}; expected above 0")
        self.url, self.model, self.template, self.system = url.rstrip("/"), model, template, system
        self.parse, self.key_from, self.name = parse or LastNumber(), key_from, name
        self.options = {"temperature": 0, **(options or {})}
        # Not described in a run's settings: they change how long it takes, not what is computed.
        self._timeout_s, self._retries, self._at_once = timeout_s, retries or Retries(), at_once
        self._fields = [] if callable(template) else _fields(template)

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The verdict on each sample."""
        prompts, key, httpx, stop = self._prompts(rollout), self._key(), _httpx(), threading.Event()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        pool = ThreadPoolExecutor(self._at_once)
        try:
            with httpx.Client(headers=headers, limits=httpx.Limits(max_connections=self._at_once)) as client:
                values = list(pool.map(partial(self._verdict, client, stop), prompts))
        finally:
            # If a time limit ended the wait, so do the waits between attempts; a request under way ends by its own.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        told = [Failure(_line(value.why, key)) if isinstance(value, Failure) else value for value in values]
        return score_each(told, self.name, rollout.mask.device)

    def _prompts(self, rollout: Rollout) -> list[str]:
        if callable(self.template):
            prompts = list(self.template(rollout))
            if len(prompts) != len(rollout):
                raise ValueError(f"the template gave {len(prompts)} texts for {len(rollout)} samples")
            return prompts
        columns = [field_of(rollout, name) for name in self._fields]
        rows = [dict(zip(self._fields, row, strict=True)) for row in zip(*columns, strict=True)]
        return [self.template.format(**row) for row in rows]

    def _key(self) -> str:
        """The API key; empty if none is needed."""
        if self.key_from is None:
            return ""
        key = os.environ.get(self.key_from, "").strip()
        if not re.fullmatch(r"[!-~]+", key):
            what = "holds blanks or odd characters" if key else "is not set"
            raise ValueError(f"the environment variable {self.key_from} {what}; expected the API key of {self.url}")
        return key

    def _verdict(self, client: Any, stop: threading.Event, prompt: str) -> float | Failure:
        """A sample's number, after as many attempts as it takes and is allowed."""
        allowed = self._retries
        for attempt in range(1, allowed.attempts + 1):
            try:
                return self._number(self._reply(client, prompt))
            except _UnansweredError as error:
                if not error.passing:
                    return Failure(f"the request failed: {error}")
                if error.wait_s > allowed.longest_wait_s:
                    return Failure(f"the request failed, and the server asks to wait {error.wait_s:.0f} s: {error}")
                why, wait_s = str(error), allowed.wait_s(attempt, error.wait_s)
            if attempt < allowed.attempts and stop.wait(wait_s):
                return Failure("the request was called off")
        return Failure(f"the request failed {allowed.attempts} times, at last: {why}")

    def _number(self, reply: str) -> float | Failure:
        try:
            value = self.parse(reply)
        except Exception as error:
            return Failure(f"the parser raised {type(error).__name__}: {error}; the answer was: {reply}")
        if value is None or not math.isfinite(value):
            return Failure(f"there is no verdict in the answer: {reply}")
        return float(value)

    def _reply(self, client: Any, prompt: str) -> str:
        """The text that the model answers."""
        try:
            status, wanted, content = self._post(client, prompt)
        except _httpx().RequestError as error:
            raise _UnansweredError(f"{type(error).__name__}: {error}", passing=True) from error
        if not 200 <= status < 300:
            passing = status in _PASSING or status >= 500
            raise _UnansweredError(f"status {status}: {content.decode(errors='replace')}", passing, _seconds(wanted))
        try:
            choice = json.loads(content)["choices"][0]
            reply, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = content.decode(errors="replace")
            raise _UnansweredError(f"the answer is no chat completion: {text}", passing=True) from error
        if not isinstance(reply, str):
            raise _UnansweredError(f"the answer has no text (finish_reason {reason})", passing=False)
        return reply

    def _post(self, client: Any, prompt: str) -> tuple[int, str, bytes]:
        """Status, `Retry-After` and content of the response to one request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, **self.options}
        deadline, content = time.monotonic() + self._timeout_s, bytearray()
        with client.stream("POST", f"{self.url}/chat/completions", json=body, timeout=self._timeout_s) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > deadline:
                    raise _httpx().ReadTimeout(f"the answer was not complete after {self._timeout_s:g} s")
        return response.status_code, response.headers.get("Retry-After", ""), bytes(content)


class _UnansweredError(Exception):
    """A request without an answer; `passing` if it may be answered later, after `wait_s` at least."""

    def __init__(self, why: str, passing: bool, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.passing, self.wait_s = passing, wait_s


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("EndpointReward needs httpx: pip install 'regimen-rl[endpoint]'") from error
    return httpx


def _check_address(url: str, key_from: str | None) -> None:
    """Raise `ValueError` unless these are an address and a name; what may be a secret is not shown."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "EndpointReward: the url holds a user name, a password or a query, which would be saved with the run; give "
            "https://host/v1, and the name of the environment variable with the key as key_from="
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"EndpointReward: url is '{url}', expected one such as http://localhost:8000/v1")
    if key_from is not None and not re.fullmatch(r"[A-Za-z_]\w*", key_from):
        raise ValueError(
            "EndpointReward: key_from is not the name of an environment variable; if it is the key itself, put it into "
            "one and give its name, such as key_from='JUDGE_API_KEY'"
        )


def _fields(template: str) -> list[str]:
    """The columns that a template names."""
    try:
        named = [re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"EndpointReward: template {template!r:.80}: {error}; write literal braces twice") from error
    if not named or not all(named):
        raise ValueError(
            f"EndpointReward: template {template!r:.80} should name columns in braces, such as {{text}}; write literal "
            "braces twice"
        )
    return list(dict.fromkeys(named))


def _seconds(wanted: str) -> float:
    """A `Retry-After` header, seconds or a date, as seconds from now; 0 if it is neither."""
    if wanted.strip().isdecimal():
        return float(wanted)
    try:
        date = email.utils.parsedate_to_datetime(wanted)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _line(text: str, key: str) -> str:
    """A reason on one line and of bearable length, without the key, which servers like to repeat."""
    hidden = text.replace(key, "***") if key else text
    short = " ".join(hidden.split())
    return short if len(short) <= _SHOWN else f"{short[:_SHOWN]}..."
