"""The Ray engine: units as tasks of one CPU each, on a cluster that is already running.

What workers read, traces, models, texts and modules of policies, must lie at the same paths on
every node. Results come back to this process, which alone writes.
"""

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

from kvpolicy.cli.sweep.pool import Job, Outcome, attempt
from kvpolicy.errors import UnsupportedError

_PATIENCE = 10.0
"""Seconds that a cluster may take to answer."""


def run_on_ray(
    work: str, jobs: Mapping[str, Job], most: int | None, address: str | None
) -> Iterator[Outcome]:
    """Do jobs on a Ray cluster, and give what comes of each as soon as it is known.

    Tasks that run are cancelled when the generator is closed.

    Args:
        work: Import path of the function that computes a job, as ``module:function``.
        jobs: By name, in the order in which they are begun.
        most: Jobs at a time; None for as many as the cluster has CPUs.
        address: Of the cluster; None for that of RAY_ADDRESS, or the one on this machine.

    Raises:
        UnsupportedError: There is no cluster there.
    """
    with _connected(address):
        most = most or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # One that dies is not tried again: what killed it would kill it again.
        task: Any = ray.remote(num_cpus=1, max_retries=0)(attempt)
        waiting = deque(jobs.items())
        running: dict[Any, tuple[str, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    name, job = waiting.popleft()
                    running[task.remote(work, dict(job))] = name, time.perf_counter()
                (done, *_), _ = ray.wait(list(running))
                name, began = running.pop(done)
                yield Outcome(name, time.perf_counter() - began, **_answer(done))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _answer(reference: Any) -> dict[str, Any]:
    """What a task returned, or how its worker ended."""
    try:
        return json.loads(ray.get(reference))
    except RayError as error:
        told = " ".join(str(error).split())
        return {"error": f"the worker process ended: {type(error).__name__}: {told[:500]}"}


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Join a cluster, and leave it."""
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _require_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise UnsupportedError(
            f"no Ray cluster {where}: {str(error).splitlines()[0]}; start one with "
            "`ray start --head`, or use --engine local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError at once if nobody listens at host:port, where Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
