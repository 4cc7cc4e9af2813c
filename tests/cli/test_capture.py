"""`kvpolicy capture` and `kvpolicy trace synth`: from a command to a trace that says what it is."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from kvpolicy import bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.cli.trace import PATTERNS
from kvpolicy.trace import Trace


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text in a folder of its own."""
    path = tmp_path_factory.mktemp("private") / "short.txt"
    path.write_text(heldout_text()[:4000], encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run a command with `--json -` and return what it printed."""
    assert main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def first_tokens(text: Path, count: int) -> list[int]:
    """The first tokens of a text, behind the model's own first one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids[: count - 1]]


def test_windows_of_the_text_become_sequences(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace is that of the same model on the same tokens, and JSON tells its size."""
    from transformers import AutoModelForCausalLM

    from kvpolicy_sim.capture import capture

    out = tmp_path / "t.kvtrace"
    result = run(
        capsys, "capture", "--text", str(text), "--tokens", "64", "--sequences", "2",
        "--out", str(out),
    )  # fmt: skip
    trace = Trace.open(out)
    assert result["schema"] == 1
    assert (result["tokens"], result["model"], result["dtype"]) == (128, "bundled", "float32")
    assert result["bytes"] == out.stat().st_size == 128 * result["bytes_per_token"]
    assert [s["source"] for s in result["sequences"]] == [
        "short.txt, window 0",
        "short.txt, window 1",
    ]
    assert [(s.tokens, s.prompt_len) for s in trace.sequences] == [(64, 64)] * 2
    assert b"private" not in out.read_bytes()
    assert trace.read("tokens", None).tolist() == first_tokens(text, 64)
    tokenizer = (Path(bundled_model()) / "tokenizer.json").read_bytes()
    assert trace.header.tokenizer == hashlib.sha256(tokenizer).hexdigest()
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    expected = capture(model, torch.tensor(first_tokens(text, 64)), tmp_path / "own.kvtrace")
    for layer in expected.header.layers:
        for kind in ("q", "k", "v", "lse", "out"):
            assert torch.equal(trace.read(kind, layer), expected.read(kind, layer))


def test_options_choose_what_is_recorded(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers, heads, strides, kinds, dtype, prompt and continuation reach the trace."""
    out = tmp_path / "t.kvtrace"
    result = run(
        capsys, "capture", "--text", str(text), "--tokens", "40", "--out", str(out), "--layers",
        "0,2:4", "--kv-heads", "1", "--query-stride", "4", "--prompt-len", "30", "--new-tokens",
        "3", "--no-outputs", "--no-tokens", "--dtype", "bfloat16",
    )  # fmt: skip
    trace = Trace.open(out)
    header = trace.header
    assert (header.layers, header.kv_heads, header.query_stride) == ((0, 2, 3), (1,), 4)
    assert (header.dtype, header.rope.kind) == ("bfloat16", "default")
    assert (trace.sequences[0].tokens, trace.sequences[0].prompt_len) == (43, 30)
    assert trace.has("lse", 0)
    assert not trace.has("out", 0)
    assert not trace.has("tokens", None)
    assert result["layers"] == [0, 2, 3]


def test_pass_keys_are_marked(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mark covers exactly the hidden sentences, and the answer follows the prompt."""
    from transformers import AutoTokenizer

    out = tmp_path / "t.kvtrace"
    result = run(
        capsys, "capture", "--text", str(text), "--tokens", "200", "--passkey", "3", "--out",
        str(out), "--layers", "0",
    )  # fmt: skip
    trace = Trace.open(out)
    seen = [trace.read("tokens", None, sequence.index).tolist() for sequence in trace.sequences]
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    assert len(result["sequences"]) == len(seen) == 3
    for ids, sequence in zip(seen, result["sequences"], strict=True):
        ((name, first, last),) = sequence["marks"]
        fact = tokenizer.decode(ids[first:last]).strip()
        key = tokenizer.decode(ids[sequence["prompt_len"] :]).strip()
        assert name == "needle"
        assert fact == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert tokenizer.decode(ids[: sequence["prompt_len"]]).endswith("The pass key is")
    places = [sequence["marks"][0][1] for sequence in result["sequences"]]
    assert places == sorted(places)


def test_size_is_announced_and_reported(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json, an estimate comes first, then path, size and speed."""
    out = tmp_path / "t.kvtrace"
    assert main(["capture", "--text", str(text), "--tokens", "64", "--out", str(out)]) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == "estimate: 64 tokens, 1.1 MiB"
    assert second.startswith(str(out))
    assert "per token" in others[-1]
    assert "tokens/s" in others[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["capture", "--tokens", "64", "--out", "{out}"],
        ["trace", "synth", "--pattern", "sink", "--tokens", "64", "--out", "{out}"],
    ],
)
def test_a_disk_without_room_is_noticed_before_work_begins(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line says how much is needed and how much there is; nothing is written."""
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20, 1 << 20, 1000))
    out = tmp_path / "t.kvtrace"
    assert main([part.format(out=out) for part in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "1,000 B free" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "100000"],
        ["--tokens", "600", "--sequences", "4"],
        ["--tokens", "1"],
        ["--layers", "99"],
        ["--layers", "x"],
        ["--kv-heads", "2"],
        ["--query-stride", "0"],
        ["--passkey", "2", "--tokens", "10"],
        ["--passkey", "2", "--sequences", "2"],
        ["--model", "no/such/model"],
        ["--out", "no/such/folder/t.kvtrace"],
        ["--text", "no/such/file"],
        ["--dtype", "int8"],
    ],
)
def test_impossible_capture_exits_with_2(
    arguments: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be captured is bad usage, said in one line, and leaves no file."""
    out = str(tmp_path / "t.kvtrace")
    assert main(["capture", "--text", str(text), "--out", out, *arguments]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "error: " in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_captured_exits_with_2(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sliding window in the model's config is refused with the reason."""
    folder = tmp_path / "windowed"
    shutil.copytree(bundled_model(), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 64,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = str(tmp_path / "t.kvtrace")
    assert main(["capture", "--text", str(text), "--model", str(folder), "--out", out]) == 2
    assert "sliding_window of 64" in capsys.readouterr().err


def test_interrupting_says_what_can_be_saved(tmp_path: Path) -> None:
    """Ctrl-C ends the command with 130 and names the command that recovers the rest."""
    out = tmp_path / "t.kvtrace"
    command = [
        sys.executable,
        "-m",
        "kvpolicy.cli",
        "capture",
        "--tokens",
        "20000",
        "--out",
        str(out),
    ]
    part = Path(f"{out}.part")
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Jobs in the background are born deaf to Ctrl-C, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        deadline = time.monotonic() + 300  # imports of a cold machine
        while not (part.exists() and part.stat().st_size > 1 << 23) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == (
        "kvpolicy capture: interrupted; what was complete can be recovered with: "
        f"kvpolicy inspect {part} --repair OUT\n"
    )
    assert part.exists()
    assert not out.exists()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_synthesised(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kvpolicy trace synth` writes what kvpolicy_sim.synth writes."""
    from kvpolicy_sim.synth import synth

    out = tmp_path / "t.kvtrace"
    result = run(
        capsys, "trace", "synth", "--pattern", pattern, "--tokens", "128", "--layers", "2",
        "--kv-heads", "1", "--group", "2", "--head-dim", "32", "--seed", "3", "--out", str(out),
    )  # fmt: skip
    expected = synth(
        tmp_path / "own.kvtrace", pattern=pattern, tokens=128, layers=2, kv_heads=1, group=2,
        head_dim=32, seed=3,
    )  # fmt: skip
    assert out.read_bytes() == expected.path.read_bytes()
    assert (result["tokens"], result["layers"], result["kv_heads"]) == (128, [0, 1], [0])


def test_every_pattern_has_a_command() -> None:
    """The command's list of patterns is the simulator's."""
    from kvpolicy_sim.patterns import PATTERNS as KNOWN

    assert list(PATTERNS) == list(KNOWN)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["synth"],
        ["synth", "--pattern", "waves", "--out", "{out}"],
        ["synth", "--pattern", "sink", "--tokens", "10", "--out", "{out}"],
        ["synth", "--pattern", "sink", "--head-dim", "16", "--out", "{out}"],
        ["synth", "--pattern", "sink"],
    ],
)
def test_impossible_synthesis_exits_with_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad usage is one line, and leaves no file."""
    out = tmp_path / "t.kvtrace"
    assert main(["trace", *(part.format(out=out) for part in arguments)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
