"""Clients that keep a server busy, each in its own manner, and write down what they got."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from soak.cases import BAD_POLICIES, Case, Catalogue

CLIENTS = 10
"""Those that ask, wait for the answer and ask again."""

BURST = 20
BURST_EVERY = 30.0

CHOICES = 3
"""Choices of a request with n > 1; greedy ones are all alike."""

STALL_SECONDS = 300.0
"""Longest time in which nobody hears anything from a server that lives."""

KEEP_ALIVE_SECONDS = 2.0
"""How long an idle connection is used again. vLLM closes it after 5 seconds, which is httpx's own
default: now and then a request would be sent on one that is just being closed, and get no answer.
"""

MANNERS = {"whole": 35, "stream": 35, "abort": 14, "several": 8, "bad": 8}
"""How often a client does what."""


@dataclass
class Answer:
    """What one request got.

    Attributes:
        case: What it asked for.
        manner: How.
        request_id: The server's name for it.
        tokens: Token ids of every choice.
        logprobs: Their log-probabilities.
        is_whole: Whether the client read to the end.
        first: Seconds until the first token; None where it came with all others.
        total: Seconds until the end.
    """

    case: Case
    manner: str
    request_id: str
    tokens: list[list[int]]
    logprobs: list[list[float]]
    is_whole: bool
    first: float | None
    total: float


@dataclass
class Record:
    """What all clients saw.

    Attributes:
        answers: In the order of their ends.
        refused: Bad requests that were answered with HTTP 400.
        faults: What should not have happened.
        in_flight: Requests that wait for their answer, by manner.
        last_sign: When anybody heard anything from the server.
    """

    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    in_flight: Counter[str] = field(default_factory=Counter)
    last_sign: float = field(default_factory=monotonic)

    def sign(self) -> None:
        """Note a sign of life."""
        self.last_sign = monotonic()


@dataclass
class Load:
    """A soak in progress.

    Attributes:
        url: The server.
        catalogue: What to ask for.
        seconds: How long clients go on asking.
        chance: Decides who asks for what, and how.
        observe: Called every few seconds with the record.
    """

    url: str
    catalogue: Catalogue
    seconds: float
    chance: random.Random
    observe: Callable[[Record, float], None]
    record: Record = field(default_factory=Record)

    async def run(self) -> Record:
        """Let clients work until the time is over and every answer is there.

        Raises:
            TimeoutError: The server fell silent.
        """
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=STALL_SECONDS, trust_env=False, limits=limits
        ) as http:
            self._http, self._end = http, monotonic() + self.seconds
            self.record.sign()
            work, watch = asyncio.create_task(self._work()), asyncio.create_task(self._watch())
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            for task in (work, watch):
                task.cancel()
            for result in await asyncio.gather(work, watch, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        return self.record

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._keep_asking())
            clients.create_task(self._read_slowly())
            while self._is_time:
                await self._pause(BURST_EVERY)
                for _ in range(BURST):
                    clients.create_task(self._ask())

    async def _watch(self) -> None:
        """Report, and give up on a server that nobody hears of."""
        while monotonic() - self.record.last_sign < STALL_SECONDS:
            self.observe(self.record, self._end - monotonic())
            await asyncio.sleep(5.0)
        raise TimeoutError(
            f"nobody heard of the server for {STALL_SECONDS:.0f} s; "
            f"in flight: {dict(self.record.in_flight)}"
        )

    @property
    def _is_time(self) -> bool:
        return monotonic() < self._end

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._end - monotonic())))

    async def _keep_asking(self) -> None:
        """Ask, wait for the answer, and ask again, now and then after a pause."""
        while self._is_time:
            await self._ask()
            await self._pause(self.chance.expovariate(2.0))

    async def _ask(self) -> None:
        [manner] = self.chance.choices([*MANNERS], [*MANNERS.values()])
        await self._send(self.catalogue.draw(self.chance), manner)

    async def _read_slowly(self) -> None:
        """Stream, and take a second for every few tokens."""
        while self._is_time:
            await self._send(self.catalogue.draw(self.chance), "slow")

    async def _send(self, case: Case, manner: str) -> None:
        """Send one request and write down its answer, or what went wrong."""
        self.record.in_flight[manner] += 1
        try:
            if manner == "bad":
                await self._send_bad(case)
            elif manner in ("whole", "several"):
                await self._send_whole(case, manner)
            else:
                await self._send_stream(case, manner)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            self.record.faults.append(f"{manner}: {case}: {type(error).__name__}: {error}")
        finally:
            self.record.in_flight[manner] -= 1
            self.record.sign()

    async def _send_bad(self, case: Case) -> None:
        """Bring a policy that must be refused, with the reason."""
        spec = self.chance.choice(BAD_POLICIES)
        body = _body(case) | {"vllm_xargs": {"kv_policy": spec}}
        response = await self._http.post("/v1/completions", json=body)
        if response.status_code != 400 or not response.json()["error"]["message"]:
            raise ValueError(f"{spec} got {response.status_code}: {response.text[:500]}")
        self.record.refused += 1

    async def _send_whole(self, case: Case, manner: str) -> None:
        """Wait for the whole answer, of one choice or several."""
        began, count = monotonic(), CHOICES if manner == "several" else 1
        body = _body(case)
        if count > 1:  # greedy as well, but vLLM refuses several choices at temperature 0
            body |= {"n": count, "temperature": 1.0, "top_k": 1}
        response = await self._http.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise ValueError(f"HTTP {response.status_code}: {response.text[:500]}")
        answer = response.json()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != count:
            raise ValueError(f"asked for {count} choices, got {len(choices)}")
        self.record.answers.append(
            Answer(
                case=case,
                manner=manner,
                request_id=answer["id"],
                tokens=[choice["token_ids"] for choice in choices],
                logprobs=[choice["logprobs"]["token_logprobs"] for choice in choices],
                is_whole=True,
                first=None,
                total=monotonic() - began,
            )
        )

    async def _send_stream(self, case: Case, manner: str) -> None:
        """Read a stream: to its end, slowly, or no further than some token."""
        began = monotonic()
        last = self.chance.randrange(1, case.max_tokens // 2) if manner == "abort" else None
        answer = Answer(case, manner, "", [[]], [[]], is_whole=False, first=None, total=0.0)
        body = _body(case) | {"stream": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {await response.aread()!r}")
            async for chunk in _chunks(response):
                self.record.sign()
                answer.request_id = chunk["id"]
                for choice in chunk["choices"]:
                    answer.tokens[0] += choice["token_ids"]
                    answer.logprobs[0] += choice["logprobs"]["token_logprobs"]
                if answer.first is None:
                    answer.first = monotonic() - began
                if last is not None and len(answer.tokens[0]) >= last:
                    break
                if manner == "slow" and len(answer.tokens[0]) % 8 == 0:
                    await self._pause(1.0)
            else:
                answer.is_whole = True
        answer.total = monotonic() - began
        self.record.answers.append(answer)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events of a stream, but for the one that ends it.

    Raises:
        ValueError: The server reported an error, or the stream ended early.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(f"in the stream: {data}")
        yield chunk
    raise ValueError("the stream ended without [DONE]")


def _body(case: Case) -> dict[str, Any]:
    """A greedy request of a fixed number of tokens, with their ids and log-probabilities."""
    return {
        "model": "bundled",
        "prompt": [*case.prompt],
        "max_tokens": case.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        **({} if case.policy is None else {"vllm_xargs": {"kv_policy": case.policy}}),
    }
