"""Batches, finished cells and interruptions, with a host whose predictions are written down."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given

from fixtures.evaluations import Table, ones, shares
from kvpolicy import PolicyError, parse
from kvpolicy.evaluation.cells import CellFile, Cells, Key
from kvpolicy.evaluation.run import evaluate
from strategies import FURTHER_BYTES

SPECS = ("full", "sinks:budget=8", "window:budget=8")
POLICIES = [parse(spec) for spec in SPECS]
CHANCES = {
    "full": [0.9, 0.8, 0.7, 0.95],
    "sinks:budget=8": [0.6, 0.4, 0.7, 0.8],
    "window:budget=8": [0.1, 0.2, 0.6, 0.3],
}
SAMPLES = {5: [ones(0), ones(1), ones(2)], 9: [ones(3, size=4), ones(4, size=4)]}
SETTINGS = {"task": "ppl", "seed": 0, "context": [5, 9]}


def test_runs_follow_the_samples_whatever_the_batches():
    """One row at a time or all together: the same entries, contexts in ascending order."""
    alone, together = (evaluate(Table(CHANCES, rows), SAMPLES, POLICIES) for rows in (1, 8))
    assert shares(alone) == shares(together)
    sizes = [len(entry.nll) for entry in alone[0].measured]
    assert sizes == [2] * 5
    assert alone[0].measured[0].right == [2, 2]
    assert alone[2].measured[0].right == [0, 1]
    assert [run.policy for run in alone] == POLICIES


@pytest.mark.parametrize("stop", range(10))
def test_a_stopped_run_goes_on_to_the_same_results(tmp_path, stop):
    """Interrupted after any number of predictions, the same file gives what one run gives."""
    path = tmp_path / "cells.jsonl"
    whole = evaluate(Table(CHANCES), SAMPLES, POLICIES, CellFile(tmp_path / "whole", SETTINGS))
    try:
        host = Table(CHANCES, stops_after=stop)
        evaluate(host, SAMPLES, POLICIES, CellFile(path, SETTINGS))
    except KeyboardInterrupt:
        assert stop < 9
    again = Table(CHANCES)
    resumed = evaluate(again, SAMPLES, POLICIES, CellFile(path, SETTINGS))
    assert shares(resumed) == shares(whole)
    # What was finished is not run again, but for the reference of a batch in the middle.
    assert len(again.asked) == 9 - min(stop, 9) + (stop % 3 > 0)
    lines = (path.read_text().splitlines(), (tmp_path / "whole").read_text().splitlines())
    assert [without_seconds(line) for line in lines[0]] == [
        without_seconds(line) for line in lines[1]
    ]


def without_seconds(line):
    """A line of the file, but for what depends on the clock."""
    return {**json.loads(line), "seconds": None}


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from evaluation import test_run as cases
class Killed(cases.Table):
    def predict(self, batch, policy):
        if len(self.asked) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(batch, policy)
cells = cases.CellFile({path!r}, cases.SETTINGS)
cases.evaluate(Killed(cases.CHANCES), cases.SAMPLES, cases.POLICIES, cells)
"""


def test_a_killed_process_leaves_its_finished_cells(tmp_path):
    """After SIGKILL five cells are on disk, and going on from them gives the same results."""
    path, tests = tmp_path / "cells.jsonl", Path(__file__).parents[1]
    program = KILLED.format(paths=[str(tests)], path=str(path))
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(path.read_bytes().splitlines()) == 1 + 5
    again = Table(CHANCES)
    resumed = evaluate(again, SAMPLES, POLICIES, CellFile(path, SETTINGS))
    assert shares(resumed) == shares(evaluate(Table(CHANCES), SAMPLES, POLICIES))
    assert [spec for spec, _ in again.asked] == ["full", SPECS[2], *SPECS]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_that_was_being_written_is_dropped(tmp_path, cut):
    """A file cut anywhere within its last line loses that cell and no other."""
    path = tmp_path / "cells.jsonl"
    whole = evaluate(Table(CHANCES), SAMPLES, POLICIES, CellFile(path, SETTINGS))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    again = Table(CHANCES)
    assert shares(evaluate(again, SAMPLES, POLICIES, CellFile(path, SETTINGS))) == shares(whole)
    assert [spec for spec, _ in again.asked] == ["full", "window:budget=8"]
    assert len(path.read_bytes().splitlines()) == len(data.splitlines())


def test_a_header_that_was_being_written_is_dropped(tmp_path):
    """A file with the beginning of its first line only is as good as none."""
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b'{"kvpolicy_eval": 1, "sett')
    evaluate(Table(CHANCES), SAMPLES, POLICIES, CellFile(path, SETTINGS))
    assert json.loads(path.read_bytes().splitlines()[0])["settings"] == SETTINGS


def test_further_policies_join_a_finished_file(tmp_path):
    """Adding a policy runs it and the full cache only."""
    path = tmp_path / "cells.jsonl"
    evaluate(Table(CHANCES), SAMPLES, POLICIES[:2], CellFile(path, SETTINGS))
    again = Table(CHANCES)
    evaluate(again, SAMPLES, POLICIES, CellFile(path, SETTINGS))
    assert {spec for spec, _ in again.asked} == {"full", "window:budget=8"}


def test_other_settings_are_refused_by_name(tmp_path):
    """The error says which setting differs, what it was and what it is."""
    path = tmp_path / "cells.jsonl"
    evaluate(Table(CHANCES), SAMPLES, POLICIES, CellFile(path, SETTINGS))
    before = path.read_bytes()
    with pytest.raises(PolicyError, match=r"other settings: seed 0, now 1;"):
        CellFile(path, {**SETTINGS, "seed": 1})
    assert path.read_bytes() == before


HEADER = json.dumps({"kvpolicy_eval": 1, "settings": SETTINGS}).encode()
ENTRY = {"nll": [1.0, 1.0], "right": [2, 2], "kl": [0.0, 0.0], "agreed": [2, 2], "diverged": None}
CELL = {"policy": "full", "context": 5, "first": 0, "measured": [ENTRY], "seconds": 1.0}


def line_of(**changes):
    """A cell's line with something else in it."""
    return json.dumps({**CELL, **changes}).encode()


def entry_of(**changes):
    """A cell's line whose entry has something else in it."""
    return line_of(measured=[{**ENTRY, **changes}])


HOSTILE = {
    "nothing like it": b"The grass is green.\n",
    "binary": bytes(range(256)) + b"\n",
    "a list": b"[1, 2]\n",
    "another program's": b'{"version": 1}\n',
    "a later version": b'{"kvpolicy_eval": 2, "settings": {}}\n',
    "settings that are none": b'{"kvpolicy_eval": 1, "settings": [1]}\n',
    "deeply nested": HEADER + b"\n" + b"[" * 100_000 + b"\n",
    "a number without end": HEADER + b'\n{"policy": ' + b"9" * 100_000 + b"}\n",
    "not UTF-8": HEADER + b'\n{"policy": "\xff"}\n',
    "no cell": HEADER + b"\n{}\n",
    "a further key": HEADER + b"\n" + line_of(more=1) + b"\n",
    "a policy of no text": HEADER + b"\n" + line_of(policy=["full"]) + b"\n",
    "a negative place": HEADER + b"\n" + line_of(first=-1) + b"\n",
    "a place that is no integer": HEADER + b"\n" + line_of(context=True) + b"\n",
    "NaN": HEADER + b"\n" + entry_of(nll=[float("nan")] * 2) + b"\n",
    "more than a float holds": HEADER + b"\n" + line_of().replace(b"1.0]", b"1e999]") + b"\n",
    "an integer beyond floats": HEADER + b"\n" + entry_of(kl=[10**400, 0]) + b"\n",
    "half a token": HEADER + b"\n" + entry_of(right=[0.5, 1]) + b"\n",
    "a figure as text": HEADER + b"\n" + entry_of(kl=["0", "0"]) + b"\n",
    "an entry without figures": HEADER + b"\n" + line_of(measured=[{}]) + b"\n",
    "time that runs backwards": HEADER + b"\n" + line_of(seconds=-1.0) + b"\n",
    "a broken line in the middle": HEADER + b"\n{\n" + line_of() + b"\n",
    "a foreign line without an end": b"The grass is green",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_left_alone(tmp_path, kind):
    """Whatever a file holds that we did not write, the error is ours and the file stays."""
    path = tmp_path / "cells.jsonl"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(PolicyError, match="give another file"):
        CellFile(path, SETTINGS)
    assert path.read_bytes() == HOSTILE[kind]


def test_what_is_no_file_is_refused(tmp_path):
    """A folder, or a pipe that nobody writes to, is refused without waiting for it."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(PolicyError, match="is no file"):
            CellFile(path, SETTINGS)


@pytest.mark.parametrize(
    "line",
    [
        line_of(),
        line_of(measured=[ENTRY] * 3),
        entry_of(nll=[1.0]),
        line_of(measured=[{**ENTRY, "right": [3, 0]}] * 2),
        line_of(measured=[{**ENTRY, "agreed": [3, 0]}] * 2),
    ],
    ids=["too few", "too many", "a target short", "more right than there are", "more agreed"],
)
def test_cells_that_cannot_be_of_the_samples_are_refused(tmp_path, line):
    """A well-formed cell with figures that these samples cannot have is not believed."""
    path = tmp_path / "cells.jsonl"
    path.write_bytes(HEADER + b"\n" + line + b"\n")
    with pytest.raises(PolicyError, match="the cell of full at 5 tokens, sample 0"):
        evaluate(Table(CHANCES), SAMPLES, POLICIES, CellFile(path, SETTINGS))


@given(FURTHER_BYTES)
def test_no_bytes_break_the_reader(tmp_path_factory, data):
    """Any bytes are read as finished cells or refused with an error of ours."""
    path = tmp_path_factory.mktemp("any") / "cells.jsonl"
    path.write_bytes(HEADER + b"\n" + data)
    try:
        cells = CellFile(path, SETTINGS)
    except PolicyError:
        assert path.read_bytes() == HEADER + b"\n" + data
    else:
        assert path.read_bytes().endswith(b"\n")
        assert cells.find(Key("full", 5, 0), SAMPLES[5][:1]) is None


def test_policies_that_set_prompts_apart_need_prompts():
    """A sample without a prompt is refused, before anything runs, where one is needed."""
    host = Table(CHANCES)
    policies = [parse("full"), parse("h2o:budget=8,prefill=bulk")]
    with pytest.raises(ValueError, match="--prompt-len"):
        evaluate(host, SAMPLES, policies)
    assert host.asked == []


def test_progress_counts_every_token_once_per_policy(tmp_path):
    """Finished cells advance the bar as well, so that it ends where it should."""
    cells, told = Cells(), []
    evaluate(Table(CHANCES), SAMPLES, POLICIES, cells)
    evaluate(Table(CHANCES), SAMPLES, POLICIES, cells, told.append)
    assert sum(told) == 3 * (3 * 5 + 2 * 9)
