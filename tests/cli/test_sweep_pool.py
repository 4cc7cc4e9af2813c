"""The local engine: results, failures, deaths and ends of worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy.cli.sweep.pool import MOST_TEXT, run_locally

WORK = "fixtures.working:told"


def outcomes(jobs, workers=2):
    """Everything that comes of some jobs, by name."""
    return {outcome.name: outcome for outcome in run_locally(WORK, jobs, workers)}


def test_jobs_are_done_in_other_processes_of_one_thread(monkeypatch):
    """Every job has its own result, from as many processes as there are workers, on one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    found = outcomes({f"job {n}": {"value": n} for n in range(6)})
    assert {name: o.result["value"] for name, o in found.items()} == {
        f"job {n}": n for n in range(6)
    }
    assert len({o.result["pid"] for o in found.values()} | {os.getpid()}) == 3
    assert all(set(o.result["threads"].values()) == {"1"} for o in found.values())
    assert all(o.error is None and o.seconds > 0 for o in found.values())


def test_whatever_goes_wrong_costs_one_job():
    """Jobs that raise, exit, return no JSON, leave or are killed fail alone, and say why."""
    jobs = {what: {"do": what, "value": 0} for what in ("fail", "exit", "nan", "die", "leave")}
    jobs |= {f"job {n}": {"value": n} for n in range(3)}
    found = outcomes(jobs)
    assert {name for name, o in found.items() if o.error is None} == {"job 0", "job 1", "job 2"}
    assert found["fail"].error == "RuntimeError: as it was told, it failed"
    assert "in told" in found["fail"].traceback
    assert found["exit"].error == "SystemExit: 3"
    assert found["nan"].error.startswith("ValueError: Out of range float")
    assert "signal 9 (Killed), as when memory runs out" in found["die"].error
    assert "exit code 7" in found["leave"].error
    assert all(len(o.error or "") <= MOST_TEXT for o in found.values())


def test_what_workers_print_does_not_reach_stdout(tmp_path):
    """Standard output belongs to the sweep's JSON: a policy that prints does so on stderr."""
    program = (
        "from kvpolicy.cli.sweep.pool import run_locally\n"
        "if __name__ == '__main__':\n"
        f"    list(run_locally({WORK!r}, {{'a': {{'do': 'print', 'value': 1}}}}, 1))\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "a stranger prints" in done.stderr


def test_workers_end_with_the_generator(tmp_path):
    """A generator that is closed in the middle of jobs leaves no process behind."""
    pipe = tmp_path / "begun"
    os.mkfifo(pipe)
    jobs = {"a": {"value": 1}, "b": {"do": "wait", "begun": str(pipe), "value": 2}}
    running = run_locally(WORK, jobs, workers=2)
    assert next(running).name == "a"
    with pipe.open("rb") as begun:
        assert begun.readline() == b"begun\n"
        running.close()
        assert begun.read() == b""  # nobody holds its other end any longer


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_begin_in_their_order(workers):
    """The first jobs are the first to be done: full caches come before what is compared with."""
    names = [f"job {n}" for n in range(5)]
    found = [o.name for o in run_locally(WORK, {name: {"value": 0} for name in names}, workers)]
    assert sorted(found) == names
    if workers == 1:
        assert found == names
