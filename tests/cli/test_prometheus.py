"""A real Prometheus server scrapes `kvpolicy serve` (`make test-prometheus`)."""

import os
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fixtures.servers import free_port, serving
from kvpolicy import parse
from kvpolicy.bundled import heldout_text
from soak.vitals import logged_requests

pytestmark = [pytest.mark.prometheus, pytest.mark.vllm]

SERVER_POLICY = "h2o:budget=96"
MIXED = {None: 3, "window:budget=64": 2, "window:budget=48,interval=1": 1}
"""How many requests bring which policy."""

FRONT_ENDS = ("1", "2")

WAIT_SECONDS = 120.0

GUIDE = Path(__file__).parents[2] / "docs/how-to/observe.md"


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """Run Prometheus on this machine, scraping a server every second."""
    program = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if program is None:
        pytest.fail(
            "no prometheus on PATH: install it (Debian, Ubuntu: apt-get install prometheus), or "
            "set PROMETHEUS to the program of a release from https://prometheus.io/download"
        )
    config, port = folder / "prometheus.yml", free_port()
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """What an expression is now."""
    response = client.get("/api/v1/query", params={"query": expression})
    assert response.status_code == 200, response.text
    return response.json()["data"]["result"]


def by_policy(client: httpx.Client, figure: str) -> dict[str, float]:
    """A figure's series, which differ in the policy only."""
    found = query(client, figure)
    for series in found:
        assert series["metric"]["job"] == "vllm"
        assert series["metric"]["model_name"] == "bundled"
        assert series["metric"]["engine"] == "0"
    values = {series["metric"]["policy"]: float(series["value"][1]) for series in found}
    assert len(values) == len(found)
    return values


def wait_for(client: httpx.Client, figure: str, expected: dict[str, float]) -> None:
    """Poll until Prometheus has scraped what is expected."""
    deadline = time.monotonic() + WAIT_SECONDS
    seen: object = None
    while time.monotonic() < deadline:
        try:
            seen = by_policy(client, figure)
        except httpx.TransportError as error:  # it has not opened its port yet
            seen = error
        if seen == expected:
            return
        time.sleep(0.2)
    pytest.fail(f"{figure}: Prometheus has {seen}, expected {expected}")


@pytest.mark.parametrize("front_ends", FRONT_ENDS)
def test_prometheus_stores_what_the_ledgers_say(front_ends: str, tmp_path: Path) -> None:
    """Series by policy name equal the sums of the log's lines, and the guide's queries run."""
    arguments = ["--kv-policy-log", "--kv-policy-allow", "h2o,window"]
    arguments += ["--api-server-count", front_ends]
    text = heldout_text()
    with (
        serving(SERVER_POLICY, *arguments, log=tmp_path / "log") as server,
        prometheus(server.url.removeprefix("http://"), tmp_path) as client,
    ):
        wait_for(client, "kvpolicy_requests_finished_total", {"h2o": 0})
        for spec, count in MIXED.items():
            for index in range(count):
                bring = {} if spec is None else {"vllm_xargs": {"kv_policy": spec}}
                response = server.complete(text[100 * index :][:1500], **bring)
                assert response.status_code == 200, response.text
        finished = Counter(
            parse(spec or SERVER_POLICY).label
            for spec, count in MIXED.items()
            for _ in range(count)
        )
        wait_for(client, "kvpolicy_requests_finished_total", finished)
        entries = logged_requests(server.log.read_text("utf-8", "replace")).values()
        assert len(entries) == sum(finished.values())
        expected: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in entries:
            policy = parse(entry.policy)
            expected["kvpolicy_evicted_tokens_total"][policy.label] += entry.evicted
            expected["kvpolicy_logical_tokens_total"][policy.label] += entry.tokens
            evictions = policy.occupancy.evictions(entry.tokens)
            expected["kvpolicy_evictions_total"][policy.label] += evictions
        for figure, sums in expected.items():
            assert all(sums.values())
            wait_for(client, figure, sums)  # a scrape may see one of a request's figures alone
        assert all(by_policy(client, "kvpolicy_policy_seconds_total").values())
        for gauge in ("requests_running", "retained_tokens", "blocks_held", "bytes_held"):
            wait_for(client, f"kvpolicy_{gauge}", dict.fromkeys(finished, 0))
        types = client.get("/api/v1/metadata").json()["data"]
        for name, [entry, *_] in types.items():
            if name.startswith("kvpolicy_"):
                expected = "counter" if name.endswith("_total") else "gauge"
                assert entry["type"] == expected
                assert entry["help"]
        for expression in guide_queries():
            query(client, expression)
        assert query(client, "sum(rate(kvpolicy_evicted_tokens_total[5m]))")


def guide_queries() -> list[str]:
    """The queries that the guide suggests."""
    [block] = re.findall(r"```promql\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    queries = [part.strip() for part in re.split(r"^#.*$", block, flags=re.MULTILINE)]
    found = [part for part in queries if part]
    assert len(found) >= 5
    return found
