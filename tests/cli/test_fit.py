"""`kvpolicy fit`: the table, JSON, the file, exit codes."""

import json

import pytest
from safetensors.torch import load_file

from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy.cli import main

SHAPE = Shape(tokens=400)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random trace."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return str(write_trace(path, random_layers(SHAPE), header=header_of(SHAPE)))


def test_fit_prints_losses_and_the_policy_to_use(path, tmp_path, capsys):
    """One line per layer, then the file and the spec that reads it, which replay accepts."""
    out = str(tmp_path / "g.safetensors")
    assert main(["fit", path, "--policy", "infini:segment=40", "--out", out]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["0", "1"]
    spec = f"infini:segment=40,gate={out}"
    assert spec in text.replace("\n", "")
    assert main(["replay", path, "--policy", spec]) == 0
    assert "memory share" in capsys.readouterr().out


def test_json_has_losses_before_and_after(path, tmp_path, capsys):
    """--json - gives the losses of every layer asked for, and nothing else."""
    out = tmp_path / "k.safetensors"
    arguments = ["fit", path, "--policy", "compressive:budget=48,fn=conv", "--out", str(out)]
    assert main([*arguments, "--layers", "1", "--steps", "3", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["file"] == str(out)
    (layer,) = result["layers"]
    assert layer["layer"] == 1
    for part in ("fitted", "held_out"):
        assert set(layer[part]) == {"before", "after"}
        assert layer[part]["before"] > 0
    assert load_file(out)["keys"].shape == (2, 2, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["missing.kvtrace", "--policy", "infini:segment=9", "--out", "OUT"], 2),
        (["PATH", "--policy", "h2o:budget=8", "--out", "OUT"], 2),
        (["PATH", "--policy", "infini:segment=9"], 2),
        (["PATH", "--policy", "infini:segment=9", "--out", "no/such/folder/x"], 2),
        (["PATH", "--policy", "infini:segment=9", "--out", "PATH"], 2),
        (["PATH", "--policy", "infini:segment=9", "--out", "OUT", "--layers", "7"], 2),
        (["PATH", "--policy", "infini:segment=9", "--out", "OUT", "--steps", "0"], 2),
        (["PATH", "--policy", "infini:segment=500", "--out", "OUT"], 2),
        (["DAMAGED", "--policy", "infini:segment=9", "--out", "OUT"], 1),
    ],
)
def test_bad_usage_is_one_line(arguments, code, path, tmp_path, capsys):
    """Wrong arguments exit with 2, a damaged trace with 1, each with one line and no file."""
    damaged, out = tmp_path / "damaged.kvtrace", tmp_path / "out"
    damaged.write_bytes(b"nothing of the kind")
    names = {"PATH": path, "DAMAGED": str(damaged), "OUT": str(out)}
    assert main(["fit", *(names.get(word, word) for word in arguments)]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "error" in lines[0]
    assert not out.exists()
