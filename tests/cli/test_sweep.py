"""`kvpolicy sweep`: what it computes, keeps, goes on from, draws together and refuses."""

import fcntl
import json
import os
import signal

import pytest

from fixtures.pages import parse_page
from fixtures.sweeping import (
    Dying,
    Failing,
    Interrupted,
    Waiting,
    figures_of,
    lines_of,
    make_grid,
    make_trace,
    path_of,
    run_here,
    without_times,
)
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy.bundled import bundled_model
from kvpolicy.cli import main
from kvpolicy.cli.sweep import command
from kvpolicy.model_facts import read_model_facts
from kvpolicy.trace import Trace

POSITIONS = read_model_facts(bundled_model()).positions or 0

GRID = 'budgets = [8, 16]\npolicies = ["window", "h2o"]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
UNITS = 7  # full, sinks, window and h2o at two budgets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a trace, in whose grids units run in this process."""
    make_trace(tmp_path)
    monkeypatch.setattr(command, "run_locally", run_here)
    return tmp_path


def sweep(folder, text=GRID, *options):
    """Run a grid; the program's exit code."""
    return main(["sweep", make_grid(folder, text), "--out", str(folder / "out"), *options])


def test_a_sweep_finds_what_a_replay_finds(folder, capsys):
    """The summary's results are the replay command's, policy by policy; tables show them."""
    assert sweep(folder) == 0
    text = capsys.readouterr().out
    specs = [f"{name}:budget={n}" for name in ("window", "h2o") for n in (8, 16)]
    path = folder / "replay.json"
    trace = str(folder / "t.kvtrace")
    assert main(["replay", trace, "--policy", *specs, "--json", str(path)]) == 0
    expected = without_times(json.loads(path.read_text()))
    (found,) = figures_of(folder / "out")["replays"]
    assert found["trace"] == expected["trace"]
    assert found["results"] == expected["results"]
    assert len(lines_of(folder / "out")) == UNITS
    assert "7 of 7 units finished" in text
    masses = {r["policy"]: f"{r['retained_mass']['mean']:.4f}" for r in found["results"]}
    (row,) = [x.split() for x in text.splitlines() if masses["h2o:budget=8"] in x]
    assert row == ["h2o", masses["h2o:budget=8"], masses["h2o:budget=16"]]


def test_processes_find_the_same(folder, monkeypatch, capsys):
    """Two worker processes leave the summary that this process leaves."""
    assert sweep(folder) == 0
    here = figures_of(folder / "out")
    (folder / "out" / "results.jsonl").unlink()
    monkeypatch.undo()
    assert sweep(folder, GRID, "--workers", "2") == 0
    assert figures_of(folder / "out") == here
    assert len(lines_of(folder / "out")) == UNITS


def test_a_finished_sweep_computes_nothing(folder, capsys):
    """Run again, the same grid only sums up; no line is added."""
    assert sweep(folder) == 0
    before = (folder / "out" / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert sweep(folder) == 0
    assert "7 units: 7 finished before, 0 to compute" in capsys.readouterr().out
    assert (folder / "out" / "results.jsonl").read_bytes() == before


def test_an_edited_grid_computes_what_is_new(folder, capsys):
    """Budgets and policies may come and go, and be written otherwise; what applies is kept."""
    assert sweep(folder) == 0
    edited = (
        'policies = ["h2o:recent=0.5,budget=16", "window", "tova:budget=16"]\nbudgets = [16, 32]\n'
        '[[replay]]\ntraces = ["./t.kvtrace"]\nlayers = "0:2"\n'
    )
    assert sweep(folder, edited) == 0
    new = [line["policy"] for line in lines_of(folder / "out")[UNITS:]]
    assert new == ["sinks:budget=32", "window:budget=32", "tova:budget=16"]
    assert len(figures_of(folder / "out")["replays"][0]["results"]) == 7
    assert sweep(folder) == 0
    assert len(lines_of(folder / "out")) == UNITS + 3


def test_other_contents_are_other_units(folder):
    """A trace that was replaced is replayed again; one that was moved is not; settings count."""
    assert sweep(folder) == 0
    (folder / "t.kvtrace").rename(folder / "moved.kvtrace")
    assert sweep(folder, GRID.replace("t.kvtrace", "moved.kvtrace")) == 0
    assert len(lines_of(folder / "out")) == UNITS
    assert sweep(folder, GRID.replace("t.kvtrace", "moved.kvtrace") + 'layers = "1"\n') == 0
    assert len(lines_of(folder / "out")) == 2 * UNITS
    make_trace(folder, seed=1)
    assert sweep(folder) == 0
    assert len(lines_of(folder / "out")) == 3 * UNITS


def test_a_strangers_code_is_part_of_the_unit(folder, monkeypatch, tmp_path):
    """A custom policy whose module was edited is computed again, built-in ones are not."""
    module = tmp_path / "stranger.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    code = (
        "import kvpolicy\nclass Mine(kvpolicy.ScorePolicy):\n    name, needs = 'mine', ()\n"
        "    def score(self, view):\n        return view.positions.float()\n"
    )
    grid = 'policies = ["stranger.Mine:budget=16"]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
    for number, text in enumerate((code, code, code + "# edited\n"), 1):
        module.write_text(text)
        assert sweep(folder, grid) == 0
        assert len(lines_of(folder / "out")) == (3 if number < 3 else 4)
    assert lines_of(folder / "out")[-1]["policy"] == "stranger.Mine:budget=16"


def test_a_failing_unit_is_recorded_and_stops_no_other(folder, capsys):
    """Exit 1, the error in one line of the table and in the file; run again, it alone is tried."""
    spec = f"{path_of(Failing)}:budget=8"
    grid = GRID.replace('"h2o"', f'"h2o", "{spec}"')
    assert sweep(folder, grid) == 1
    text = capsys.readouterr().out
    assert "1 unit failed" in text
    assert "7 of 8 units finished, 1 failed" in text
    (failed,) = [line for line in lines_of(folder / "out") if "error" in line]
    assert failed["policy"] == spec
    assert failed["error"].endswith(f"{spec} failed: RuntimeError: no score today, nor tomorrow")
    assert "in score" in failed["traceback"]
    assert figures_of(folder / "out")["failures"] == [
        {"source": "t.kvtrace", "policy": spec, "error": failed["error"]}
    ]
    assert sweep(folder, grid) == 1
    assert [line["policy"] for line in lines_of(folder / "out")[8:]] == [spec]
    assert sweep(folder) == 0


def test_a_worker_that_dies_costs_one_unit(folder, monkeypatch, capsys):
    """A policy that takes its process with it fails alone; a new worker does what is left."""
    monkeypatch.undo()
    spec = f"{path_of(Dying)}:budget=8"
    grid = f'policies = ["{spec}", "window:budget=8"]\n[[replay]]\ntraces = ["t.kvtrace"]\n'
    assert sweep(folder, grid, "--workers", "1") == 1
    assert "signal 9 (Killed)" in capsys.readouterr().out
    assert {line["policy"]: "result" in line for line in lines_of(folder / "out")} == {
        "full": True,
        "sinks:budget=8": True,
        spec: False,
        "window:budget=8": True,
    }


WAITING = (
    f'policies = ["window:budget=8", "{path_of(Waiting)}:budget=8", "h2o:budget=8"]\n'
    '[[replay]]\ntraces = ["t.kvtrace"]\n'
)


def test_a_killed_sweep_goes_on_where_it_was(folder):
    """SIGKILL in the fourth unit: three are kept to the byte, two computed, the worker is gone."""
    running = Interrupted(folder, WAITING, 3)
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
    kept = (folder / "out" / "results.jsonl").read_bytes()
    assert [line["policy"] for line in lines_of(folder / "out")] == [
        "full",
        "sinks:budget=8",
        "window:budget=8",
    ]
    assert sweep(folder, WAITING) == 0
    data = (folder / "out" / "results.jsonl").read_bytes()
    assert data.startswith(kept)
    assert data.count(b"\n") == 1 + 5
    resumed = figures_of(folder / "out")
    (folder / "out" / "results.jsonl").unlink()
    assert sweep(folder, WAITING) == 0
    assert figures_of(folder / "out") == resumed


def test_an_interrupted_sweep_ends_cleanly(folder):
    """Ctrl-C, which reaches every process of a terminal: exit 130, one line, nothing lost."""
    running = Interrupted(folder, WAITING, 3)
    os.killpg(running.process.pid, signal.SIGINT)
    code, err = running.end()
    assert code == 130
    assert err == "stopped: 3 of 5 units finished; the same command goes on\n"
    assert sweep(folder, WAITING) == 0
    assert len(lines_of(folder / "out")) == 5


@pytest.mark.parametrize("cut", [1, 30, 700])
def test_a_torn_last_line_costs_its_unit_alone(folder, cut):
    """A file cut within its last line loses one unit, which is computed again."""
    assert sweep(folder) == 0
    file, expected = folder / "out" / "results.jsonl", figures_of(folder / "out")
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    assert sweep(folder) == 0
    assert file.read_bytes().startswith(data[: data.rindex(b"\n", 0, -1) + 1])
    assert len(lines_of(folder / "out")) == UNITS
    assert figures_of(folder / "out") == expected


def altered(line, **changes):
    """A line with something else in it."""
    return json.dumps({**json.loads(line), **changes}).encode()


HOSTILE = {
    "nothing like it": lambda _: [b"The grass is green."],
    "another program's": lambda lines: [b'{"kvpolicy_eval": 1}', *lines[1:]],
    "a later version": lambda lines: [b'{"kvpolicy_sweep": 2}', *lines[1:]],
    "a broken line": lambda lines: [*lines[:3], b"{", *lines[3:]],
    "a unit of other inputs": lambda lines: [*lines[:-1], altered(lines[-1], unit="0" * 64)],
    "neither result nor error": lambda lines: [*lines[:-1], altered(lines[-1], result=None)],
    "an error beside a result": lambda lines: [*lines[:-1], altered(lines[-1], error="no")],
    "a result of nothing": lambda lines: [*lines[:-1], altered(lines[-1], result={})],
    "another policy's result": lambda lines: [
        *lines[:-1],
        altered(lines[-1], result=json.loads(lines[1])["result"]),
    ],
    "a figure as text": lambda lines: [*lines[:-1], lines[-1].replace(b'"p5": 0', b'"p5": "0" ')],
    "NaN": lambda lines: [*lines[:-1], lines[-1].replace(b'"p5": 0', b'"p5": NaN, "p": 0')],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_results_that_cannot_be_right_are_refused_and_left_alone(folder, kind, capsys):
    """Whatever a file holds that we did not write, the error is ours and the file stays."""
    assert sweep(folder) == 0
    file = folder / "out" / "results.jsonl"
    lines = file.read_bytes().splitlines()
    data = b"\n".join(HOSTILE[kind](lines)) + b"\n"
    assert data.splitlines() != lines
    file.write_bytes(data)
    capsys.readouterr()
    assert sweep(folder) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "give another folder with --out" in error
    assert file.read_bytes() == data


def test_a_folder_serves_one_sweep_at_a_time(folder, capsys):
    """While another sweep holds the folder, a second one is refused and writes nothing."""
    (folder / "out").mkdir()
    with (folder / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep(folder) == 2
    assert "another sweep is writing to" in capsys.readouterr().err
    assert not (folder / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("t.kvtrace", "missing.kvtrace"), "[[replay]] 1: [Errno 2]"),
        (GRID + 'layers = "9"\n', "[[replay]] 1: layers [9] are not in the trace"),
        (GRID + 'sequences = "3"\n', "[[replay]] 1: sequences [3] are not in the trace"),
        (GRID.replace('"h2o"', '"h2o:prefill=bulk"'), "sets the prompt apart"),
        (GRID.replace('"h2o"', '"infini:segment=8,gate=x.safetensors"'), "no such regular file"),
        (GRID + '[[eval]]\nmodels = ["no/model"]\n', "[[eval]] 1: no config.json"),
        (GRID + '[[eval]]\ntext = "missing.txt"\n', "[[eval]] 1: [Errno 2]"),
        (GRID + f"[[eval]]\ncontexts = [{POSITIONS + 1}]\n", f"ends at the {POSITIONS} positions"),
        (GRID + '[[eval]]\ntask = "recall"\ncontexts = [16]\n', "context must hold all"),
        (
            GRID + '[[eval]]\npolicies = ["h2o:budget=8,prefill=bulk"]\nbudgets = []\n',
            "say how many of its first tokens are the prompt",
        ),
    ],
)
def test_what_a_grid_names_is_checked_before_anything_runs(folder, text, message, capsys):
    """Missing and unsupported things are one error that names the entry; nothing is written."""
    assert sweep(folder, text) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (folder / "out").exists()


def test_a_damaged_trace_is_refused_with_its_entry(folder, capsys):
    """A trace that was cut short exits with 1, as for `kvpolicy replay`, and names the entry."""
    path = folder / "t.kvtrace"
    path.write_bytes(path.read_bytes()[:-100])
    assert sweep(folder) == 1
    assert "[[replay]] 1: " in capsys.readouterr().err


def test_a_trace_that_changes_meanwhile_fails_its_units(folder, monkeypatch):
    """A trace replaced after the grid was checked gives no result under the old one's name."""

    def replacing(work, jobs, workers):
        make_trace(folder, seed=5)
        yield from run_here(work, jobs, workers)

    monkeypatch.setattr(command, "run_locally", replacing)
    assert sweep(folder) == 1
    errors = {line["error"] for line in lines_of(folder / "out")}
    assert len(errors) == 1
    assert "t.kvtrace is not what it was when the sweep began" in errors.pop()


def test_a_dry_run_estimates_and_writes_nothing(folder, capsys):
    """--dry-run counts units, bounds memory, guesses time and leaves no folder behind."""
    assert sweep(folder, GRID, "--dry-run", "--workers", "3", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["units"] == {"total": UNITS, "finished": 0}
    assert found["workers"] == 3
    assert found["estimate"]["bytes"] > 3 * (50 << 20)
    assert found["estimate"]["seconds"] > 0
    assert not (folder / "out").exists()
    assert sweep(folder) == 0
    capsys.readouterr()
    assert sweep(folder, GRID + '[[replay]]\ntraces = ["t.kvtrace"]\n', "--dry-run") == 0
    assert "7 units, 0 of them to compute" in capsys.readouterr().out


def test_json_goes_alone_to_stdout(folder, capsys):
    """--json - is the summary and nothing else, the same as in the folder."""
    assert sweep(folder, GRID, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "out" / "summary.json").read_text())
    assert found["units"] == {"total": UNITS, "failed": 0}


def test_the_page_has_a_section_per_source(folder, capsys):
    """Table and picture of each, with a line per policy, even where two are called alike."""
    (folder / "more").mkdir()
    make_trace(folder / "more", "[t].kvtrace", seed=3)
    grid = GRID.replace('["t.kvtrace"]', '["t.kvtrace", "more/[t].kvtrace"]')
    assert sweep(folder, grid, "--png", str(folder / "png")) == 0
    text = capsys.readouterr().out
    assert "[t].kvtrace" in text
    assert f"wrote {folder}/out/summary.html" in text.replace("\n", "")
    page = parse_page((folder / "out" / "summary.html").read_text("utf-8"))
    sections = page.all("section")
    assert [section.attributes["id"] for section in sections] == ["t-kvtrace", "t-kvtrace-2"]
    for section, found in zip(sections, figures_of(folder / "out")["replays"], strict=True):
        masses = [row[1].text for row in section.cells()]
        assert masses == [f"{x['retained_mass']['mean']:.4f}" for x in found["results"]]
        assert [row[0] for row in section.numbers()] == ["slots", "sinks", "window", "h2o"]
    names = sorted(path.name for path in (folder / "png").iterdir())
    assert names == ["replay-t-kvtrace-2.png", "replay-t-kvtrace.png"]


def test_long_and_foreign_names_are_told_apart(folder):
    """Sources whose names agree in all that an address may hold have sections of their own."""
    names = [f"{'x' * 100}{n}.kvtrace" for n in range(2)] + ["\u9053", "\u8def"]
    for name in names:
        make_trace(folder, name)
    grid = f'policies = ["window:budget=8"]\n[[replay]]\ntraces = {json.dumps(names)}'
    assert sweep(folder, grid, "--png", str(folder / "png")) == 0
    page = parse_page((folder / "out" / "summary.html").read_text("utf-8"))
    ids = [section.attributes["id"] for section in page.all("section")]
    assert ids == ["x" * 72, f"{'x' * 72}-2", "2", "3"]
    assert [section.first("h2").text for section in page.all("section")] == names
    assert len([*(folder / "png").iterdir()]) == len(names)


def test_failures_stand_on_the_page(folder):
    """A unit that failed is named with its error, beside what others found."""
    grid = f'policies = ["{path_of(Failing)}:budget=8"]\n[[replay]]\ntraces = ["t.kvtrace"]'
    assert sweep(folder, grid) == 1
    page = parse_page((folder / "out" / "summary.html").read_text("utf-8"))
    [row] = page.section("Failures").cells()
    assert "no score today," in row[1].text


def test_a_page_that_cannot_be_drawn_stops_a_sweep_before_it_runs(folder, monkeypatch, capsys):
    """Without matplotlib nothing is computed; a dry run needs none."""
    monkeypatch.setattr("kvpolicy.extras.find_spec", lambda _: None)
    assert sweep(folder, GRID, "--dry-run") == 0
    assert sweep(folder) == 2
    assert "extra report" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_policies_without_a_budget_have_a_line_each(folder, capsys):
    """Where budgets are no common scale, there is one table with a line per policy."""
    grid = 'policies = ["infini:segment=16", "window:budget=8"]\n[[replay]]\ntraces = ["t.kvtrace"]'
    assert sweep(folder, grid) == 0
    lines = capsys.readouterr().out.splitlines()
    for spec in ("full", "sinks:budget=8", "infini:segment=16", "window:budget=8"):
        assert sum(line.startswith(spec + " ") for line in lines) == 1


def test_several_sequences_have_intervals(tmp_path, monkeypatch, capsys):
    """Of a trace with several sequences the interval of the mean is drawn."""
    monkeypatch.setattr(command, "run_locally", run_here)
    shape = Shape(tokens=64)
    layers = [random_layers(shape, seed) for seed in range(3)]
    write_trace(tmp_path / "t.kvtrace", *layers, header=header_of(shape))
    assert sweep(tmp_path) == 0
    (found,) = figures_of(tmp_path / "out")["replays"]
    assert all(len(r["retained_mass"]["interval"]) == 2 for r in found["results"])


def test_an_engine_of_another_kind_is_refused(folder, capsys):
    """--address without Ray, and Ray where it is not installed, are usage errors."""
    assert sweep(folder, GRID, "--address", "auto") == 2
    assert "add --engine ray" in capsys.readouterr().err
    (folder / "out").write_text("a file")
    assert sweep(folder) == 2
    assert "it is a file" in capsys.readouterr().err


def test_a_traces_identity_is_that_of_its_contents(tmp_path):
    """Equal contents have equal identities, and any number that differs changes it."""
    shape = Shape(tokens=40)
    one, two = (random_layers(shape) for _ in range(2))
    paths = [
        write_trace(tmp_path / name, layers, header=header_of(shape))
        for name, layers in (("a", one), ("b", two))
    ]
    two[0].v[0, 0, 0] += 1
    paths.append(write_trace(tmp_path / "c", two, header=header_of(shape)))
    paths.append(write_trace(tmp_path / "d", one, header=header_of(shape, model="other")))
    paths.append(write_trace(tmp_path / "e", one, header=header_of(shape), prompt_len=3))
    identities = []
    for path in paths:
        with Trace.open(path) as trace:
            identities.append(trace.identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 4
