"""A worker's figures on vLLM's own ``/metrics``.

They are born in a worker and served by another process. The two meet in a directory of small
mapped files, in the form in which processes share figures through prometheus_client: its own
collector reads them at every scrape, and a worker only writes numbers into mapped memory.

A front end makes the directory and names it in the environment, which its processes inherit. It
is no setting of the engine, because vLLM's compile cache depends on those. With several front
ends vLLM makes such a directory itself, and all of them serve what lies in it.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, NamedTuple
from weakref import finalize

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from kvpolicy import CachePolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvpolicy_vllm.book import Finished

OURS = "KVPOLICY_METRICS_DIR"
"""Environment variable with the directory of the front end that started a process."""

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The same of vLLM and prometheus_client; it takes precedence."""

_SECONDS = 1.0
"""Least time between two looks at running requests."""


class Counter(NamedTuple):
    """A figure that finished requests add to.

    Attributes:
        help: What it counts.
        amount: What one request adds.
        adds_up: Whether every worker of a tensor-parallel engine adds its share; otherwise the
            first one speaks for all.
    """

    help: str
    amount: "Callable[[Finished], float]"
    adds_up: bool = False


COUNTERS = {
    "kvpolicy_requests_finished": Counter(
        "Requests that finished or were aborted after they ran.", lambda _: 1
    ),
    "kvpolicy_logical_tokens": Counter(
        "Tokens that finished requests processed.", lambda request: request.ledger.logical_tokens
    ),
    "kvpolicy_evicted_tokens": Counter(
        "Tokens evicted from finished requests, mean over layers and KV heads.",
        lambda request: request.ledger.evicted,
    ),
    "kvpolicy_merged_tokens": Counter(
        "Evicted tokens that finished requests' memories stood for, mean over layers and KV heads.",
        lambda request: request.ledger.merged,
    ),
    "kvpolicy_evictions": Counter(
        "Evictions in finished requests; one takes place in all layers.",
        lambda request: request.ledger.evictions,
    ),
    "kvpolicy_policy_seconds": Counter(
        "Time that observing and evicting took in finished requests.",
        lambda request: request.ledger.policy_seconds,
    ),
    "kvpolicy_bytes_saved": Counter(
        "Bytes of KV cache that finished requests held less than under full; below it, they add 0.",
        lambda request: max(0, request.ledger.bytes_saved),
        adds_up=True,
    ),
    "kvpolicy_contained_faults": Counter(
        "Finished requests whose policy failed, so that a window went on for it; should stay 0.",
        lambda request: request.ledger.fault is not None,
    ),
    "kvpolicy_ledger_errors": Counter(
        "Finished requests whose evictions differ from their occupancy law; should stay 0.",
        lambda request: not request.is_sound,
    ),
}
"""By the name without Prometheus' suffix ``_total``."""


class Gauge(NamedTuple):
    """A figure of requests that run now.

    Attributes:
        help: What it is.
        value: What one request contributes.
        adds_up: As that of a counter.
    """

    help: str
    value: "Callable[[Running], float]"
    adds_up: bool = False


class Running(NamedTuple):
    """A running request.

    Attributes:
        policy: Its policy.
        retained: Tokens that it retains.
        blocks: Blocks that it holds.
        num_bytes: Bytes of these blocks in all layers of this worker.
    """

    policy: CachePolicy
    retained: float
    blocks: int
    num_bytes: int


GAUGES = {
    "kvpolicy_requests_running": Gauge("Requests that run.", lambda _: 1),
    "kvpolicy_retained_tokens": Gauge(
        "Tokens that running requests retain, per layer and KV head.",
        lambda running: running.retained,
    ),
    "kvpolicy_blocks_held": Gauge(
        "Blocks that running requests hold.", lambda running: running.blocks
    ),
    "kvpolicy_bytes_held": Gauge(
        "Bytes of the blocks that running requests hold, policy state included.",
        lambda running: running.num_bytes,
        adds_up=True,
    ),
}


def expose() -> None:
    """Serve figures of engines that this process starts on its ``/metrics``; idempotent."""
    if _exposed or SHARED in os.environ:
        return
    directory = tempfile.mkdtemp(prefix="kvpolicy-metrics-")
    os.environ[OURS] = directory
    atexit.register(_remove, directory, os.getpid())
    _exposed.append(MultiProcessCollector(REGISTRY, directory))


_exposed: list[MultiProcessCollector] = []
"""What reads this process's directory, once there is one."""


def _remove(directory: str, owner: int) -> None:
    """Remove the directory, but not when a forked child exits."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def _close(counters: MmapedDict, gauges: MmapedDict, gauge_file: Path) -> None:
    counters.close()
    gauges.close()
    gauge_file.unlink(missing_ok=True)


class Meter:
    """One worker's figures, kept by policy name: requests may bring any spec, but few names."""

    def __init__(
        self, directory: Path, stem: str, labels: dict[str, str], *, is_first: bool
    ) -> None:
        """Open the worker's two files.

        Args:
            directory: Where the front end looks.
            stem: Part of the file names, without underscores.
            labels: Those of vLLM's own figures.
            is_first: Whether this worker speaks for its tensor-parallel engine.
        """
        self._labels = labels
        self._counters = MmapedDict(directory / f"counter_{stem}.db")
        gauge_file = directory / f"gauge_livesum_{stem}.db"
        self._gauges = MmapedDict(gauge_file)
        # Engines of a script are dropped rather than shut down.
        self._end = finalize(self, _close, self._counters, self._gauges, gauge_file)
        self._end.atexit = False  # a forked child exits too
        self._counted = {k: v for k, v in COUNTERS.items() if is_first or v.adds_up}
        self._shown = {k: v for k, v in GAUGES.items() if is_first or v.adds_up}
        self._keys: dict[tuple[str, str], str] = {}
        self._names: set[str] = set()
        self._next_look = 0.0

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Meter | None":
        """The meter of an engine's worker; None where no front end looks."""
        directory = os.environ.get(SHARED) or os.environ.get(OURS)
        if directory is None:
            return None
        if not Path(directory).is_dir():
            from vllm.logger import init_logger

            init_logger(__name__).warning(
                "kvpolicy: no figures for /metrics, because %s is no directory", directory
            )
            return None
        parallel = vllm_config.parallel_config
        return cls(
            Path(directory),
            f"kvpolicy-{os.getpid()}-{vllm_config.instance_id}-{parallel.rank}",
            {
                "model_name": str(vllm_config.model_config.served_model_name),
                "engine": str(parallel.data_parallel_index),
            },
            is_first=parallel.rank == 0,
        )

    def begin(self, policy: CachePolicy) -> None:
        """Show a policy's figures from zero on, so that rates see its first requests."""
        name = policy.label
        if name in self._names:
            return
        self._names.add(name)
        for figure in self._counted:
            self._add(figure, name, 0.0)
        for figure in self._shown:
            self._gauges.write_value(self._key(figure, name), 0.0, time())

    def count(self, request: "Finished") -> None:
        """Add a finished request."""
        self.begin(request.policy)
        for figure, counter in self._counted.items():
            self._add(figure, request.policy.label, counter.amount(request))

    def is_due(self, num_running: int) -> bool:
        """Whether to look at running requests: once a second, and when the last one ended."""
        return num_running == 0 or monotonic() >= self._next_look

    def show(self, running: Iterable[Running]) -> None:
        """Replace the figures of running requests."""
        self._next_look = monotonic() + _SECONDS
        sums = {(figure, name): 0.0 for figure in self._shown for name in self._names}
        for request in running:
            self.begin(request.policy)
            for figure, gauge in self._shown.items():
                key = figure, request.policy.label
                sums[key] = sums.get(key, 0.0) + gauge.value(request)
        now = time()
        for (figure, name), value in sums.items():
            self._gauges.write_value(self._key(figure, name), value, now)

    def close(self) -> None:
        """Withdraw the figures of running requests; what was counted stays."""
        self._end()

    def _add(self, figure: str, name: str, amount: float) -> None:
        key = self._key(figure, name)
        before, _ = self._counters.read_value(key)
        self._counters.write_value(key, before + amount, time())

    def _key(self, figure: str, name: str) -> str:
        """What the file calls a figure of a policy."""
        key = self._keys.get((figure, name))
        if key is None:
            labels = {**self._labels, "policy": name}
            is_counter = figure in COUNTERS
            sample = f"{figure}_total" if is_counter else figure
            text = (COUNTERS if is_counter else GAUGES)[figure].help
            key = mmap_key(figure, sample, [*labels], [*labels.values()], text)
            self._keys[figure, name] = key
        return key
