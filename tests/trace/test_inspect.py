"""`kvpolicy inspect`: exit codes, text and JSON, and the files that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fixtures.small_traces import (
    Stream,
    random_streams,
    read_streams,
    same,
    small_header,
    write_streams,
)
from kvpolicy.cli import main
from kvpolicy.trace import Trace
from oracles.trace_format import take_apart

HEADER = small_header(model="a model", producer="tests", query_stride=2)
LENGTHS = (1100, 30)
MARKS = (("needle", 10, 20),)


@pytest.fixture(scope="module")
def streams() -> dict[Stream, Tensor]:
    """What the trace holds."""
    return random_streams(HEADER, LENGTHS, kinds=("q", "k", "v", "lse", "tokens"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, streams: dict[Stream, Tensor]) -> Path:
    """A trace of two sequences."""
    target = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_streams(target, HEADER, streams, prompt_len=25, marks=MARKS)


@pytest.fixture
def damaged(path: Path, tmp_path: Path) -> Path:
    """The trace with a flipped bit in a payload."""
    data = bytearray(path.read_bytes())
    entry = next(x for x in take_apart(bytes(data)).index if x[:4] == ["k", 0, 2, 512])
    data[entry[5] + 7] ^= 1
    (tmp_path / "damaged.kvtrace").write_bytes(data)
    return tmp_path / "damaged.kvtrace"


@pytest.fixture
def unfinished(path: Path, tmp_path: Path) -> Path:
    """The trace as a crash leaves it."""
    (tmp_path / "u.kvtrace.part").write_bytes(path.read_bytes()[:-5000])
    return tmp_path / "u.kvtrace.part"


def inspect(
    capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> dict[str, Any]:
    """Run with `--json -`, require an exit code, and return the JSON."""
    assert main(["inspect", *map(str, arguments), "--json", "-"]) == code
    return json.loads(capsys.readouterr().out)


def test_text_names_header_sequences_and_sizes(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person sees what was recorded, of what, and how large it is."""
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "t.kvtrace: 2 sequences, 1,130 tokens",
        "a model llama",
        "2 of 3: 0,2",
        "2 of 2: 0:2, 2 query heads each",
        "float32, keys of 4, values of 3, scale 0.5",
        "of the tokens 0, 2, 4, ...",
        "default, 2 frequencies",
        "needle 10:20",
        "source 1",
        "per token",
    ):
        assert expected in text
    assert "checksum" not in text


def test_json_has_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that scripts rely on, with exact bytes."""
    found = inspect(capsys, path)
    assert found["schema"] == 1
    assert (found["ok"], found["error"], found["verified"]) == (True, None, False)
    assert found["path"] == str(path)
    assert found["file_bytes"] == path.stat().st_size
    assert found["tokens"] == 1130
    assert found["header"]["version"] == 1
    assert found["header"]["layers"] == [0, 2]
    assert found["sequences"][1] == {
        "index": 1,
        "tokens": 30,
        "prompt_len": 25,
        "source": "source 1",
        "marks": [["needle", 10, 20]],
    }
    assert found["layers"][1] == {
        "layer": 2,
        "bytes": {
            "q": 4 * 4 * 4 * 565,
            "k": 2 * 4 * 4 * 1130,
            "v": 2 * 3 * 4 * 1130,
            "lse": 4 * 4 * 565,
            "out": 0,
        },
    }
    assert found["token_id_bytes"] == 4 * 1130
    total = 4 * 1130 + sum(sum(layer["bytes"].values()) for layer in found["layers"])
    assert found["bytes_per_token"] == total / 1130


# --- damage -----------------------------------------------------------------------------------


def test_verify_accepts_an_intact_trace(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every checksum was compared, and the exit code says that they match."""
    found = inspect(capsys, path, "--verify")
    assert (found["ok"], found["verified"], found["damage"]) == (True, True, [])
    assert main(["inspect", str(path), "--verify"]) == 0
    assert "Every checksum matches." in capsys.readouterr().out


def test_verify_finds_damage(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with the place and what to do."""
    found = inspect(capsys, damaged, "--verify", code=1)
    assert not found["ok"]
    assert found["error"] == "damaged in 1 place"
    assert found["damage"] == [
        "k of layer 2, sequence 0, rows 512:1024: its checksum does not match"
    ]
    assert main(["inspect", str(damaged), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "rows 512:1024: its checksum does not match" in text
    assert "--repair OUT" in text


def test_an_unfinished_trace_is_damage(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one line that says how much can be recovered, and how."""
    found = inspect(capsys, unfinished, code=1)
    assert not found["ok"]
    assert main(["inspect", str(unfinished)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"kvpolicy: error: {found['error']}"
    assert "truncated or never completed" in line
    assert f"kvpolicy inspect {unfinished} --repair OUT" in line


@pytest.mark.parametrize("arguments", [["no.kvtrace"], ["."], ["no.kvtrace", "--repair", "x"]])
def test_what_is_no_file_is_bad_usage(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A missing file and a directory exit with 2 and one line."""
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1: the file is there and is not what it should be."""
    assert main(["inspect", __file__]) == 1
    assert "not a kvpolicy trace" in capsys.readouterr().err


# --- repair -----------------------------------------------------------------------------------


def test_repair_writes_what_is_intact(
    unfinished: Path, capsys: pytest.CaptureFixture[str], streams: dict[Stream, Tensor]
) -> None:
    """The name without .part becomes a complete trace; the JSON says what there is."""
    target = unfinished.with_suffix("")
    found = inspect(capsys, unfinished, "--repair", target)["repair"]
    assert found["path"] == str(target)
    assert found["chunks"] == found["intact"] == found["used"] > 0
    assert found["lost"] == []
    assert found["tokens"] == 1130
    assert found["sequences"][1] == {"index": 1, "was": 1, "tokens": 30}
    assert inspect(capsys, target, "--verify")["ok"]
    with Trace.open(target) as trace:
        assert same(read_streams(trace), streams)


def test_repair_says_what_is_lost(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text names damaged chunks and tokens that are gone."""
    target = damaged.with_name("r.kvtrace")
    assert main(["inspect", str(damaged), "--repair", str(target)]) == 0
    text = capsys.readouterr().out
    assert f"Wrote {target}: 2 sequences, 542 tokens." in text
    assert "k of layer 2, sequence 0, rows 512:1024: its checksum does not match" in text
    assert "sequence 0: tokens 512:1100" in text


def test_a_hopeless_repair_fails(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and no file where nothing can be recovered."""
    (tmp_path / "b").write_bytes(path.read_bytes()[:9000])
    assert main(["inspect", str(tmp_path / "b"), "--repair", str(tmp_path / "r")]) == 1
    assert "nothing can be recovered" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# --- slice and export -------------------------------------------------------------------------


def test_a_slice_is_written(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--slice with --out gives a valid, smaller trace."""
    target = tmp_path / "s.kvtrace"
    arguments = ("--slice", "layers=2,tokens=0:512,sequence=0,kv_heads=1", "--out", target)
    found = inspect(capsys, path, *arguments)
    assert found["slice"]["path"] == str(target)
    assert found["slice"]["header"]["kv_heads"] == [1]
    part = inspect(capsys, target, "--verify")
    assert part["ok"]
    assert part["header"] == found["slice"]["header"]
    assert [sequence["tokens"] for sequence in part["sequences"]] == [512]
    assert target.stat().st_size < path.stat().st_size / 2


def test_slice_and_export_go_together(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One selection as a trace and as safetensors; a note says what had to be left out."""
    from safetensors.torch import load_file

    out, tensors = tmp_path / "s", tmp_path / "x"
    arguments = ("--slice", "tokens=10:20,sequence=1", "--out", out, "--export", tensors)
    found = inspect(capsys, path, *arguments)
    assert found["slice"]["notes"] == found["export"]["notes"]
    assert "lse and out are left out" in found["export"]["notes"][0]
    assert load_file(tensors)["s0.l0.q"].shape == (4, 5, 4)
    assert main(["inspect", str(path), *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    assert f"Wrote {out}" in text
    assert "lse and out are left out" in text


def test_damage_in_a_slice_fails(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slice of damaged chunks is not written; --verify stops before it begins."""
    arguments = ("--slice", "layers=2", "--out", tmp_path / "s")
    found = inspect(capsys, damaged, *arguments, code=1)
    assert "rows 512:1024: its checksum does not match" in found["error"]
    assert not inspect(capsys, damaged, "--verify", *arguments, code=1)["ok"]
    assert not (tmp_path / "s").exists()
    inspect(capsys, damaged, "--slice", "layers=0", "--out", tmp_path / "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slice", "layers=0"], "--slice needs --out FILE or --export FILE"),
        (["--out", "s"], "--out writes a slice; add --slice"),
        (["--slice", "x=1", "--out", "s"], "a slice has no 'x'"),
        (["--slice", "layers=1", "--out", "s"], "layers=1 is not all in the trace"),
        (["--slice", "tokens=9999:", "--out", "s"], "begins behind sequence 0"),
        (["--repair", "r", "--verify"], "--repair writes a new trace; use --verify on that one"),
        (["--repair", "r", "--export", "x"], "use --export on that one"),
        (["--repair", "t"], "cannot write 't': it is read by this command"),
        (["--slice", "layers=0", "--out", "t"], "cannot write 't': it is read by this command"),
        (["--export", "t"], "cannot write 't': it is read by this command"),
    ],
)
def test_bad_usage_is_refused(
    arguments: list[str],
    message: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line, nothing printed and nothing written."""
    (tmp_path / "t").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "t", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").read_bytes() == path.read_bytes()


def test_names_in_a_trace_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escape sequences and markup in a hostile file's texts are shown, not obeyed."""
    header = small_header(model="\x1b[2Jmodel [bold]x[/nope]", layers=(0,))
    streams = random_streams(header, [9], kinds=("q", "k", "v"))
    path = write_streams(tmp_path / "t", header, streams, marks=[("\x1b]0;x\x07", 0, 3)])
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "model [bold]x[/nope]" in text


def test_long_lists_are_shortened_in_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifty sequences and layers stay readable; JSON has all of them."""
    header = small_header(num_layers=50, layers=tuple(range(50)))
    streams = random_streams(header, [2] * 30, kinds=("q", "k", "v"))
    path = write_streams(tmp_path / "t", header, streams)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "and 10 more" in text
    assert "and 32 more" in text
    found = inspect(capsys, path)
    assert (len(found["sequences"]), len(found["layers"])) == (30, 50)
