"""`kvpolicy sweep --engine ray` on a real Ray cluster of this machine; run with `make test-ray`.

Ray's processes listen on every interface, whatever they are told. So the cluster, its sweeps and
the tests live in a network namespace of their own, which has nothing but a loopback.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fixtures.sweeping import (
    TESTS,
    Dying,
    Failing,
    Interrupted,
    Waiting,
    figures_of,
    lines_of,
    make_grid,
    make_pipes,
    make_trace,
    path_of,
    run_here,
)
from kvpolicy.cli import main
from kvpolicy.cli.sweep import command

pytestmark = pytest.mark.ray

PORT = 6399

WAITING = (
    f'policies = ["window:budget=8", "{path_of(Waiting)}:budget=8", "h2o:budget=8"]\n'
    '[[replay]]\ntraces = ["t.kvtrace"]\n'
)
OPTIONS = ("--engine", "ray", "--workers", "1")

GET_FLAGS, SET_FLAGS, IS_UP = 0x8913, 0x8914, 1
"""Of Linux: requests to read and write an interface's flags, and the flag that it is up."""


def flags_of(name):
    """Read an interface's flags."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        found = fcntl.ioctl(asked, GET_FLAGS, struct.pack("16sh22x", name.encode(), 0))
    return struct.unpack_from("h", found, 16)[0]


def enter_own_network():
    """Bring the loopback up; refuse a network that others can reach."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    if any(flags_of(name) & IS_UP for name in names):
        pytest.fail("this network can be reached, and Ray listens everywhere: use `make test-ray`")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        fcntl.ioctl(asked, SET_FLAGS, struct.pack("16sh22x", b"lo", flags_of("lo") | IS_UP))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trace, whose pipes the cluster's workers know."""
    folder = tmp_path_factory.mktemp("sweeps")
    make_trace(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(folder):
    """A cluster of two CPUs; variables that lead a sweep to it."""
    enter_own_network()
    variables = {"PYTHONPATH": str(TESTS), "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # sockets' paths may not be long
        options = (
            f"--head --block --node-ip-address=127.0.0.1 --port={PORT} --temp-dir={short} "
            "--num-cpus=2 --object-store-memory=100000000 --include-dashboard=false "
            "--disable-usage-stats"
        )
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()],
            env={**os.environ, **make_pipes(folder), "PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = iter(head.stdout.readline, "")
        assert any("Ray runtime started" in line for line in lines)
        yield {**os.environ, **variables}
        head.terminate()
        head.communicate()


def sweep(folder, cluster, text, out):
    """Run a grid on the cluster; exit code and what it said."""
    arguments = [make_grid(folder, text), "--out", str(folder / out), "--engine", "ray"]
    return subprocess.run(
        [sys.executable, "-m", "kvpolicy.cli", "sweep", *arguments, "--json", "-"],
        env=cluster,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_killed_sweep_goes_on_where_it_was(folder, cluster):
    """SIGKILL in the fourth unit: three are kept to the byte, and only two are computed."""
    running = Interrupted(folder, WAITING, 3, OPTIONS, cluster)
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
    kept = (folder / "out" / "results.jsonl").read_bytes()
    assert kept.count(b"\n") == 1 + 3
    done = sweep(folder, cluster, WAITING, "out")
    assert done.returncode == 0, done.stderr
    data = (folder / "out" / "results.jsonl").read_bytes()
    assert data.startswith(kept)
    assert data.count(b"\n") == 1 + 5
    assert json.loads(done.stdout)["units"] == {"total": 5, "failed": 0}


def test_an_interrupted_sweep_ends_cleanly(folder, cluster):
    """Ctrl-C: exit 130, one line, the unit that ran is cancelled and nothing is lost."""
    running = Interrupted(folder, WAITING, 3, OPTIONS, cluster, out="interrupted")
    running.process.send_signal(signal.SIGINT)
    code, err = running.end()
    assert code == 130
    assert "stopped: 3 of 5 units finished; the same command goes on" in err
    assert "Traceback" not in err
    assert len(lines_of(folder / "interrupted")) == 3


def test_ray_finds_what_processes_find(folder, cluster, monkeypatch):
    """The summary is the local engine's, and JSON goes alone to stdout."""
    text = 'policies = ["window", "h2o"]\nbudgets = [8, 16]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
    done = sweep(folder, cluster, text, "on-ray")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "on-ray/summary.json").read_text())
    monkeypatch.setattr(command, "run_locally", run_here)
    assert main(["sweep", make_grid(folder, text), "--out", str(folder / "here")]) == 0
    assert figures_of(folder / "on-ray") == figures_of(folder / "here")


def test_whatever_fails_costs_one_unit(folder, cluster):
    """A policy that raises and one that takes its worker with it are recorded; others finish."""
    specs = [f"{path_of(kind)}:budget=8" for kind in (Failing, Dying)]
    listed = ", ".join(f'"{spec}"' for spec in [*specs, "window:budget=8"])
    text = f'policies = [{listed}]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
    done = sweep(folder, cluster, text, "failing")
    assert done.returncode == 1, done.stderr
    errors = {line["policy"]: line.get("error") for line in lines_of(folder / "failing")}
    assert len(errors) == 5
    assert "RuntimeError: no score today, nor tomorrow" in errors.pop(specs[0])
    assert "the worker process ended: WorkerCrashedError" in errors.pop(specs[1])
    assert set(errors.values()) == {None}


def test_no_cluster_is_said_in_one_line(folder, cluster):
    """A sweep that finds no cluster where it was told to look exits with 2 and says what to do."""
    text = 'policies = ["window:budget=8"]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
    nowhere = {**cluster, "RAY_ADDRESS": "127.0.0.1:1"}
    done = sweep(folder, nowhere, text, "nowhere")
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("kvpolicy: error")]
    assert "no Ray cluster at" in error
    assert Path(folder / "nowhere").is_dir()
