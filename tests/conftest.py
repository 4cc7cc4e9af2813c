"""One environment for every test: offline, one torch thread, fixed seeds, poisoned memory."""

import gc
import importlib.util
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from fixtures.installations import ROOT, build

# Set before anything imports a host: the hosts read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# One process per engine: start-up is dominated by imports, which each further process repeats.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# vLLM would bind two threads to cores that other tests keep busy.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same draws in every run; nothing that a slow machine fails.
settings.register_profile(
    "kvpolicy",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvpolicy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what rewrites a file that was reviewed."""
    parser.addoption(
        "--write-api", action="store_true", help="rewrite tests/core/public_api.txt: review it"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    lacks_gpu = not torch.cuda.is_available()
    lacks_vllm = importlib.util.find_spec("vllm") is None
    for item in items:
        if lacks_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if lacks_vllm and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="needs vLLM: install kvpolicy[cpu] or [vllm]"))


def pytest_unconfigure() -> None:
    """Let the process end: vLLM looks for garbage twice with every engine that ends at exit."""
    gc.collect = lambda *_: 0


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sdist and wheel of the tree."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill fresh floating-point memory with NaN, so that reading an unwritten slot shows.

    Not around vLLM engines, whose kernels may read and mask unwritten cells, nor benchmarks.
    torch poisons only in deterministic mode, which changes nothing else that matters on a CPU.
    The private setter is what torch.use_deterministic_algorithms calls after importing Inductor,
    which takes seconds.
    """
    if request.node.get_closest_marker("vllm") or request.node.get_closest_marker("bench"):
        yield
        return
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    yield
    torch._C._set_deterministic_algorithms(False, warn_only=False)
