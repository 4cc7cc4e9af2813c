"""`kvpolicy replay` and `kvpolicy recommend`: tables, JSON, estimates, exit codes."""

import json

import pytest

from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import parse
from kvpolicy.cli import main

SHAPE = Shape(tokens=200)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random trace."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return str(write_trace(path, random_layers(SHAPE), header=header_of(SHAPE)))


def test_replay_prints_a_line_per_policy_beside_its_baselines(path, capsys):
    """The full cache and sinks at the same budget stand beside the policy asked for."""
    assert main(["replay", path, "--policy", "h2o:budget=64"]) == 0
    text = capsys.readouterr().out
    for spec in ("full", "sinks:budget=64", "h2o:budget=64"):
        assert sum(line.startswith(spec) for line in text.splitlines()) == 1
    assert "estimate: at most" in text
    assert "layer-local" in text


def test_json_goes_alone_to_stdout(path, capsys):
    """--json - writes nothing but JSON, at the level asked for."""
    arguments = ["replay", path, "--policy", "h2o:budget=64", "--level", "open-loop"]
    assert main([*arguments, "--layers", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trace"]["layers"] == 1
    assert {entry["level"] for entry in result["results"]} == {"open-loop"}


def test_oracle_adds_a_regret_interval(path, capsys):
    """--oracle bounds the regret of every policy that evicts, and random's is the largest."""
    arguments = ["replay", path, "--policy", "h2o:budget=32", "random:budget=32", "--oracle"]
    assert main([*arguments, "--json", "-"]) == 0
    entries = {e["policy"]: e for e in json.loads(capsys.readouterr().out)["results"]}
    assert entries["full"]["oracle_gap"] is None
    for spec in ("sinks:budget=32", "h2o:budget=32", "random:budget=32"):
        regret = entries[spec]["regret"]
        assert 0 <= regret["lower"] <= regret["upper"] < 1
        assert entries[spec]["oracle_gap"] == regret["upper"]
    assert entries["random:budget=32"]["oracle_gap"] > entries["h2o:budget=32"]["oracle_gap"]


def test_dry_run_reads_nothing_but_the_header(path, capsys):
    """--dry-run prints the estimate and stops."""
    assert main(["replay", path, "--policy", "h2o:budget=64", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("estimate: at most")
    assert "retained mass" not in text


def test_html_is_written_where_asked(path, tmp_path):
    """--html writes a page that names the policies."""
    page = tmp_path / "r.html"
    assert main(["replay", path, "--policy", "h2o:budget=64", "--html", str(page)]) == 0
    assert "h2o:budget=64" in page.read_text("utf-8")


def test_memories_have_columns_of_their_own(path, capsys):
    """The memory's share, merged tokens and bytes at peak stand where a policy has a memory."""
    assert main(["replay", path, "--policy", "centroid:budget=64,slots=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if line.startswith("policy "))
    assert all(name in header for name in ("memory share", "merged", "at peak"))
    rows = {line.split()[0]: line.split() for line in lines if ":budget=64" in line}
    assert "-" in rows["sinks:budget=64"]
    assert (
        str(parse("centroid:budget=64,slots=16").occupancy.evicted(200))
        in rows["centroid:budget=64,slots=16"]
    )
    assert main(["replay", path, "--policy", "window:budget=64"]) == 0
    assert "memory share" not in capsys.readouterr().out


def test_weights_are_read_for_policies_that_need_them(tmp_path, capsys):
    """--weights gives level=model the bundled model's layers; without it the advice names it."""
    import torch

    import kvpolicy_sim
    from fixtures.models import SMALL_SHAPE, random_llama

    model, spec = random_llama(**SMALL_SHAPE).eval(), "fam:block=8,segments=1,slots=4,level=model"
    model.save_pretrained(tmp_path / "model")
    trace = str(tmp_path / "t.kvtrace")
    kvpolicy_sim.capture(model, torch.arange(60), trace)
    capsys.readouterr()
    assert main(["replay", trace, "--policy", spec]) == 2
    assert "--weights" in capsys.readouterr().err
    assert main(["replay", trace, "--policy", spec, "--weights", str(tmp_path / "model")]) == 0
    assert "memory share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["replay", "missing.kvtrace", "--policy", "full"], 2),
        (["replay", "PATH", "--policy", "h2o"], 2),
        (["replay", "PATH", "--policy", "full", "--layers", "9"], 2),
        (["replay", "PATH", "--policy", "full", "--layers", "4:2"], 2),
        (["replay", "PATH"], 2),
        (["replay", "DAMAGED", "--policy", "full"], 1),
        (["recommend", "PATH", "--target", "1.5"], 2),
        (["recommend", "PATH", "--policy", "full"], 2),
        (["recommend", "PATH", "--policy", "h2o:budget=64"], 2),
    ],
)
def test_bad_usage_is_one_line(arguments, code, path, tmp_path, capsys):
    """Wrong arguments exit with 2, a damaged trace with 1, each with one line."""
    damaged = tmp_path / "damaged.kvtrace"
    damaged.write_bytes(b"nothing of the kind")
    names = {"PATH": path, "DAMAGED": str(damaged)}
    assert main([names.get(word, word) for word in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "error" in lines[0]


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("target", ["TRACE", "missing/x", "."])
def test_outputs_that_cannot_be_written_are_refused_first(option, target, tmp_path, capsys):
    """A trace is never overwritten by its own report, and nothing is computed in vain."""
    path = tmp_path / "t.kvtrace"
    write_trace(path, random_layers(SHAPE), header=header_of(SHAPE))
    before, target = path.read_bytes(), str(path) if target == "TRACE" else target
    assert main(["replay", str(path), "--policy", "full", option, target]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "cannot write" in captured.err
    assert path.read_bytes() == before


def test_recommend_finds_the_smallest_budget(path, capsys):
    """The budget recommended keeps the target, and one 1/64 smaller does not."""
    import kvpolicy_sim

    arguments = ["recommend", path, "--target", "0.8", "--policy", "window", "h2o:recent=0.25"]
    assert main([*arguments, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["policy"].split(":")[0] for r in results] == ["window", "h2o"]
    for found in results:
        assert found["retained_mass"] >= 0.8
        spec = found["policy"].replace(f"budget={found['budget']}", "budget={}")
        smaller = spec.format(found["budget"] - max(1, found["budget"] // 64))
        report = kvpolicy_sim.replay(path, [smaller])
        assert report.result(smaller).retained_mass["mean"] < 0.8
