"""The soak's report: what a person reads, and JSON."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from soak.clients import Record
from soak.solo import Verdict
from soak.vitals import Trend

_POINTS = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True)
class Report:
    """Everything that one soak found.

    Attributes:
        seconds: How long it took, from the first request to the last answer.
        record: What the clients saw.
        figures: The server's own, when everything had ended.
        trends: Resident memory of its processes.
        contained: Finished requests whose policy failed, by quarter of those that finished.
        verdict: How answers compared with solo runs.
        faults: What should not have happened.
    """

    seconds: float
    record: Record
    figures: dict[str, float]
    trends: list[Trend]
    contained: list[int]
    verdict: Verdict
    faults: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report, JSON-ready."""
        return {
            "schema": 1,
            "seconds": self.seconds,
            "requests": self._requests(),
            "preemptions": self.figures["vllm:num_preemptions_total"],
            "seconds_to_first_token": self._percentiles("first"),
            "seconds_to_end": self._percentiles("total"),
            "server": {k: v for k, v in self.figures.items() if k.startswith("kvpolicy_")},
            "contained": {"requests": sum(self.contained), "by_quarter": self.contained},
            "memory": [asdict(trend) for trend in self.trends],
            "solo": asdict(self.verdict),
            "faults": self.faults,
        }

    def _requests(self) -> dict[str, int]:
        manners = Counter(answer.manner for answer in self.record.answers)
        return {**manners, "bad": self.record.refused}

    def _percentiles(self, what: str) -> dict[str, dict[str, float]]:
        """Percentiles of a duration by manner, over whole answers."""
        times: dict[str, list[float]] = {}
        for answer in self.record.answers:
            value = getattr(answer, what)
            if answer.is_whole and value is not None:
                times.setdefault(answer.manner, []).append(value)
        return {
            manner: {name: float(np.percentile(values, q)) for name, q in _POINTS.items()}
            for manner, values in sorted(times.items())
        }

    def __str__(self) -> str:
        data, solo = self.as_dict(), self.verdict
        total, minutes = sum(data["requests"].values()), self.seconds / 60
        lines = [
            "",
            f"soak of {minutes:.1f} minutes: {total:,} requests, "
            f"{data['preemptions']:.0f} preemptions",
            "  " + ", ".join(f"{n:,} {manner}" for manner, n in sorted(data["requests"].items())),
            "",
            f"{'seconds':24}" + "".join(f"{name:>9}" for name in _POINTS),
        ]
        for title, key in (("first token", "seconds_to_first_token"), ("end", "seconds_to_end")):
            for manner, row in data[key].items():
                label = f"{title}, {manner}"
                lines.append(f"{label:24}" + "".join(f"{value:9.2f}" for value in row.values()))
        lines += ["", f"{'resident MiB':24}{'first':>9}{'middle':>9}{'last':>9}{'per 1000':>9}"]
        lines += [
            f"{t.name:24}{t.first:9.1f}{t.middle:9.1f}{t.last:9.1f}{t.per_1000:9.2f}"
            for t in self.trends
        ]
        lines += [
            "",
            f"against {solo.cases} solo runs: {solo.choices:,} choices, {solo.tokens:,} tokens; "
            f"log-probabilities within {solo.noise:.1e}; parted at a near-tie of two tokens "
            f"{solo.token_ties}, of an eviction {solo.set_ties}",
            f"policies failed in {sum(self.contained):,} requests, by quarter of the soak "
            f"{', '.join(map(str, self.contained))}; /metrics counts "
            f"{self.figures['kvpolicy_contained_faults_total']:,.0f}",
            "",
            *(f"{k:40}{v:16,.0f}" for k, v in sorted(data["server"].items())),
            "",
            *(f"FAULT {fault}" for fault in self.faults),
        ]
        return "\n".join(lines)
