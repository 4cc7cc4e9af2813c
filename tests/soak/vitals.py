"""A server's vital signs: resident memory of its processes, its figures, its log."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

SAMPLE_SECONDS = 10.0

_REQUEST = re.compile(
    r"kvpolicy: request=(\S+) policy=(\S+) tokens=(\d+) .*?evicted=(\S+) .* contained=(\d)"
)

_FAILURE = re.compile(r"kvpolicy: request (\S+) under \S+: .*; a window goes on there")


@dataclass(frozen=True)
class Trend:
    """How a process's resident memory went in the second half of a run.

    Attributes:
        name: The process.
        first: MiB at the beginning of the run.
        middle: MiB at the beginning of the second half, on the fitted line.
        last: MiB at its end, on the fitted line.
        per_1000: MiB per 1,000 requests, on the fitted line.
        samples: (requests answered, MiB) over the whole run.
    """

    name: str
    first: float
    middle: float
    last: float
    per_1000: float
    samples: list[tuple[int, float]]


@dataclass
class Memory:
    """Resident memory of all processes of a session, sampled.

    Attributes:
        session: The session's id, which is its leader's process id.
        samples: (requests answered, MiB) by process.
    """

    session: int
    samples: dict[tuple[int, str], list[tuple[int, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _next: float = 0.0

    def sample(self, num_requests: int) -> None:
        """Look at every process, if it is time."""
        if monotonic() < self._next:
            return
        self._next = monotonic() + SAMPLE_SECONDS
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat, status = (folder / "stat").read_text(), (folder / "status").read_text()
            except OSError:  # it has just ended
                continue
            name, _, fields = stat.partition("(")[2].rpartition(")")
            resident = re.search(r"VmRSS:\s+(\d+) kB", status)
            if int(fields.split()[3]) == self.session and resident:
                sample = num_requests, int(resident[1]) / 1024
                self.samples[int(folder.name), name].append(sample)

    def trends(self) -> list[Trend]:
        """A line through the second half of each process's samples."""
        found: list[Trend] = []
        for (_, name), samples in self.samples.items():
            late = np.array(samples[len(samples) // 2 :], dtype=float)
            requests, resident = late[:, 0], late[:, 1]
            if requests[0] == requests[-1]:
                continue
            slope, start = np.polyfit(requests, resident, 1)
            middle, last = slope * requests[[0, -1]] + start
            found.append(
                Trend(
                    name=name,
                    first=samples[0][1],
                    middle=float(middle),
                    last=float(last),
                    per_1000=float(1000 * slope),
                    samples=samples,
                )
            )
        return found


def scrape(http: httpx.Client) -> dict[str, float]:
    """A server's figures, summed over their labels."""
    sums: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return sums


@dataclass(frozen=True)
class Logged:
    """A finished request's line in the log."""

    policy: str
    tokens: int
    evicted: float
    is_contained: bool


def logged_requests(log: str) -> dict[str, Logged]:
    """Finished requests by the server's name for them, choices apart, in the order of their end."""
    return {
        name: Logged(policy, int(tokens), float(evicted), contained == "1")
        for name, policy, tokens, evicted, contained in _REQUEST.findall(log)
    }


def failed_requests(log: str) -> set[str]:
    """Requests whose policies failed, in the same names; some may not have finished."""
    return {*_FAILURE.findall(log)}


def alarming_lines(log: str) -> list[str]:
    """What a server should not have to say."""
    return [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
