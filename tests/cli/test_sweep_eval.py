"""Sweeps of models: the figures of `kvpolicy eval`, computed unit by unit."""

import json

import pytest

from fixtures.pages import parse_page
from fixtures.sweeping import figures_of, lines_of, make_grid, run_here, without_times
from kvpolicy import parse
from kvpolicy.cli import main
from kvpolicy.cli.sweep import command
from kvpolicy.cli.sweep.grid import read_grid
from kvpolicy.cli.sweep.pool import run_locally
from kvpolicy.cli.sweep.sources import open_units
from kvpolicy.cli.sweep.work import Remembering
from kvpolicy.evaluation.sample import Sample, Target

GRID = """
policies = ["window", "h2o:prefill=bulk"]
budgets = [16, 32]
[[eval]]
task = "passkey"
contexts = [64]
samples = 3
"""
OPTIONS = "--task passkey --context 64 --samples 3 --budgets 16,32".split()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder in which a grid of the bundled model was swept in this process."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_locally", run_here)
        assert main(["sweep", make_grid(folder, GRID), "--out", str(folder / "out")]) == 0
    return folder


def test_a_sweep_finds_what_an_evaluation_finds(swept, capsys):
    """Values, intervals, comparisons and curves are the eval command's, to the last digit."""
    path = swept / "eval.json"
    arguments = ["eval", "--policy", "window", "h2o:prefill=bulk", *OPTIONS, "--json", str(path)]
    assert main(arguments) == 0
    expected = without_times(json.loads(path.read_text()))
    (found,) = figures_of(swept / "out")["evaluations"]
    assert found["results"] == expected["results"]
    assert (found["task"], found["context"], found["samples"]) == ("passkey", 64, 3)


def test_an_evaluation_has_a_section(swept):
    """The page has the figures of `kvpolicy eval --html`, and quality against budget."""
    page = parse_page((swept / "out" / "summary.html").read_text("utf-8"))
    section = page.section("passkey, 64 tokens, bundled")
    (found,) = figures_of(swept / "out")["evaluations"]
    names = [row.first("th").text for row in section.first("tbody").all("tr")]
    assert [name[1:] for name in names] == [result["policy"] for result in found["results"]]
    assert section.numbers()[-1][0] == "full"


def test_a_result_that_samples_cannot_have_is_refused(swept, tmp_path, monkeypatch, capsys):
    """Figures for other targets than were asked about are not believed."""
    monkeypatch.setattr(command, "run_locally", run_here)
    lines = (swept / "out" / "results.jsonl").read_bytes().splitlines()
    line = json.loads(lines[-1])
    line["result"]["measured"][0]["right"] = [99]
    (tmp_path / "results.jsonl").write_bytes(b"\n".join([*lines[:-1], json.dumps(line).encode()]))
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b"\n")
    assert main(["sweep", make_grid(swept, GRID), "--out", str(tmp_path)]) == 2
    assert f"the result of {line['policy']} on passkey, 64 tokens" in capsys.readouterr().err


def test_another_text_is_another_unit(swept, tmp_path, monkeypatch):
    """Samples are part of a unit: of another text, or another number, all is computed again."""
    monkeypatch.setattr(command, "run_locally", run_here)
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_bytes((swept / "out" / "results.jsonl").read_bytes())
    number = len(lines_of(out))
    assert main(["sweep", make_grid(tmp_path, GRID + "seed = 1\n"), "--out", str(out)]) == 0
    assert len(lines_of(out)) == 2 * number


class Counting:
    """A host that counts what it is asked."""

    def __init__(self):
        self.asked = []

    def predict(self, batch, policy):
        """A prediction of a hundred numbers for each sample."""
        import torch

        self.asked.append(str(policy))
        return [torch.zeros(10, 10) for _ in batch]


def batch_of(number):
    """A batch of one sample."""
    target = Target(first=1, last=2, group=(0, 1))
    return [Sample(tokens=[number, 1], prompt_tokens=0, targets=[target])]


def test_small_references_are_computed_once():
    """The full cache runs once per batch as long as there is room, a policy every time."""
    host, full, window = Counting(), parse("full"), parse("window:budget=8")
    remembering = Remembering(host, room=500)
    for _ in range(2):
        for number in (0, 1):
            remembering.predict(batch_of(number), full)
            remembering.predict(batch_of(number), window)
    # The first batch's 400 bytes were kept; there was no room for the second one's.
    assert host.asked.count("window:budget=8") == 4
    assert host.asked.count("full") == 1 + 2


@pytest.mark.slow
def test_workers_stay_within_their_estimate(tmp_path):
    """A worker that does every unit of a trace and of a model never holds what was foreseen."""
    trace = tmp_path / "t.kvtrace"
    assert main(["capture", "--tokens", "1024", "--out", str(trace)]) == 0
    grid = (
        'policies = ["window:budget=64", "h2o:budget=64", "centroid:budget=64"]\n'
        '[[replay]]\ntraces = ["t.kvtrace"]\n[[eval]]\ncontexts = [1024]\nsamples = 8\n'
    )
    units = {unit.id: unit for unit in open_units(read_grid(make_grid(tmp_path, grid)))}
    jobs = {name: unit.job for name, unit in units.items()}
    for outcome in run_locally("fixtures.working:compute_and_measure", jobs, workers=1):
        unit = units[outcome.name]
        assert outcome.result is not None, outcome.error
        assert outcome.result["peak"] <= unit.source.cost(unit.policy).bytes, unit.policy
