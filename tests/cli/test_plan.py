"""`kvpolicy plan`: the demo's and an 8B model's figures, exact JSON, and refusals in one line."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.cli.output import size
from kvpolicy.cli.plan import UNITS, context_lengths, memory_size

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "plan-memory.md"

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
TOP = (
    "schema semantics model geometry dtype tensor_parallel kv_heads_per_rank bytes_per_token "
    "block_size bytes_per_block memory_bytes pool_blocks contexts notes stock results"
).split()
RESULT = (
    "policy budget slots_per_request blocks_per_request bytes_per_request dense_bytes_per_request "
    "longest_context longest_context_limit contexts"
).split()
CONTEXT = "context slots blocks bytes dense_bytes requests ratio_to_full".split()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with Llama-3-8B's config."""
    return write_config(tmp_path / "llama-3-8b")


def write_config(folder: Path, **changes: Any) -> Path:
    """Write Llama-3-8B's config with changes into a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B | changes), encoding="utf-8")
    return folder


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run the command with `--json -` and return what it printed."""
    assert main(["plan", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command and return its text."""
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must exit with 2, and return its single line of error."""
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.match("kvpolicy(?: plan)?: error: ", line)
    return line


def test_figures_are_those_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """What `kvpolicy demo` measures in real vLLM (README) is what was planned."""
    arguments = "--dtype float32 --block-size 32 --memory 256MiB --context 848,32768".split()
    result = plan(capsys, "--policy", "window:budget=96", "h2o:budget=96", *arguments)
    full, *others = result["results"]
    longest_request, served = full["contexts"]
    assert longest_request["blocks"] == 27
    assert size(longest_request["bytes"]) == "5.1 MiB"
    assert result["pool_blocks"] / served["blocks"] == pytest.approx(1.31, abs=0.005)
    assert [entry["policy"] for entry in others] == [
        "sinks:budget=96",
        "window:budget=96",
        "h2o:budget=96",
    ]
    for entry in others:
        assert entry["blocks_per_request"] == 4
        assert size(entry["bytes_per_request"]) == "780.0 KiB"
        assert [at["requests"] for at in entry["contexts"]] == [336, 336]
        assert entry["contexts"][1]["ratio_to_full"] == 256
    stock = result["stock"]
    assert stock["pool_blocks"] / stock["contexts"][1]["blocks"] == pytest.approx(1.33, abs=0.005)


def test_dense_bytes_are_those_of_a_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    """What a PolicyCache holds after 150 tokens is what was planned for transformers."""
    from kvpolicy_hf.checkpoint import load_checkpoint
    from kvpolicy_hf.greedy import generate_greedy

    checkpoint = load_checkpoint(kvpolicy.bundled_model())
    prompt = [*checkpoint.start, *range(100, 240)]
    held = generate_greedy(checkpoint.model, prompt, "h2o:budget=48", 8).ledger.bytes_held
    result = plan(capsys, "--policy", "h2o:budget=48", "--dtype", "float32")
    assert result["results"][-1]["dense_bytes_per_request"] == held


def test_guide_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guide's config and command give its output to the letter: 128 KiB per token."""
    text = GUIDE.read_text("utf-8")
    config = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"```console\n\$ kvpolicy plan (.*?)\n(.*?)```", text, re.DOTALL)
    assert config is not None
    assert shown is not None
    assert json.loads(config[1]) == LLAMA_3_8B
    monkeypatch.chdir(tmp_path)
    write_config(Path("llama-3-8b"))
    assert printed(capsys, *shlex.split(shown[1])) == shown[2]
    assert "128.0 KiB per token" in shown[2]


def test_json_has_its_keys_and_agrees_with_itself(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every level has its keys, full and sinks stand first, and the figures fit together."""
    policies = ["tova:budget=300", "h2o:budget=1024,interval=1"]
    result = plan(capsys, "--model", str(model), "--policy", *policies, "--memory", "7GiB")
    assert list(result) == TOP
    assert (result["schema"], result["semantics"]) == (1, kvpolicy.SEMANTICS)
    assert result["geometry"] == {
        "model_type": "llama",
        "layers": 32,
        "sliding_layers": 0,
        "sliding_window": None,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "positions": 8192,
    }
    assert result["contexts"] == [4096, 8192]
    assert result["bytes_per_token"] == 128 << 10
    assert result["block_size"] == 128
    assert result["memory_bytes"] == 7 << 30
    names = [entry["policy"] for entry in result["results"]]
    assert names == ["full", "sinks:budget=300", "sinks:budget=1024", *policies]
    full = result["results"][0]
    for entry in result["results"]:
        assert list(entry) == RESULT
        law = kvpolicy.parse(entry["policy"]).occupancy
        assert entry["slots_per_request"] == law.capacity
        for at, at_full in zip(entry["contexts"], full["contexts"], strict=True):
            assert list(at) == CONTEXT
            assert at["blocks"] == law.num_blocks(at["context"], 128)
            assert at["bytes"] == at["blocks"] * result["bytes_per_block"]
            assert at["requests"] * at["bytes"] <= 7 << 30 < (at["requests"] + 1) * at["bytes"]
            assert at["ratio_to_full"] == at_full["bytes"] / at["bytes"]
    assert full["budget"] is None
    assert full["blocks_per_request"] is None
    assert result["results"][-1]["slots_per_request"] == 1025
    for at in result["stock"]["contexts"]:
        assert at["bytes"] == at["context"] * 128 << 10


def test_sliding_layers_are_planned_as_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3 1B: four ruled layers share a table, 22 sliding ones have six, under any policy."""
    folder = write_config(
        tmp_path / "gemma-3-1b",
        model_type="gemma3_text",
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        sliding_window_pattern=6,
        max_position_embeddings=32768,
    )
    arguments = ("--model", str(folder), "--policy", "window:budget=1000,interval=24")
    result = plan(capsys, *arguments)
    geometry, (full, _, window) = result["geometry"], result["results"]
    assert (geometry["sliding_layers"], geometry["sliding_window"]) == (22, 512)
    page = 128 * (2 * 256 * 2 + 8)
    assert result["bytes_per_block"] == 4 * page
    sliding = 6 * 5  # 511 tokens before the newest, which may begin anywhere in a block
    assert window["blocks_per_request"] == 8 + sliding
    assert [at["blocks"] for at in window["contexts"]] == [8 + sliding] * 2
    assert [at["blocks"] for at in full["contexts"]] == [32 + sliding, 256 + sliding]
    dense = 4 * 1024 * (1024 + 12) + 22 * 511 * 1024
    assert window["dense_bytes_per_request"] == dense
    assert [at["requests"] for at in window["contexts"]] == [(1 << 30) // (4 * page) // 38] * 2
    shown = " ".join(printed(capsys, *arguments).split())
    assert "26 layers, 22 with a window of 512" in shown
    assert "vLLM's own maximum concurrency adds a chunk of prompt" in shown


def test_default_pool_gives_requests_per_gib(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --memory the pool is 1 GiB, of the bundled model's own dtype."""
    result = plan(capsys, "--policy", "window:budget=64")
    assert result["memory_bytes"] == 1 << 30
    assert (result["model"], result["dtype"]) == ("bundled", "bfloat16")
    assert result["contexts"] == [4096, 32768, 131072]


@pytest.mark.parametrize(
    ("spec", "memory", "tokens", "limit"),
    [
        ("full", "1GiB", 62 * 128, "pool"),
        ("full", "2GiB", 8192, "positions"),
        ("h2o:budget=1024", "1GiB", 8192, "positions"),
        ("h2o:budget=1024,rope_beyond=allow", "1GiB", None, None),
        ("sinks:budget=1024,rope=reindex", "1GiB", None, None),
        ("full:rope_beyond=allow", "2GiB", 125 * 128, "pool"),
        ("h2o:budget=1024", "100MiB", 5 * 128, "pool"),
        ("full", "1MiB", 0, "pool"),
    ],
)
def test_longest_request_names_its_bound(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    spec: str,
    memory: str,
    tokens: int | None,
    limit: str | None,
) -> None:
    """The longest request ends with the pool, with the positions, or never."""
    arguments = ["--model", str(model), "--policy", spec, "--memory", memory]
    entry = next(x for x in plan(capsys, *arguments)["results"] if x["policy"] == spec)
    assert (entry["longest_context"], entry["longest_context_limit"]) == (tokens, limit)
    text = printed(capsys, *arguments)
    assert ("any length" if tokens is None else f"{tokens:,} ({limit})") in text


def test_context_beyond_the_positions_is_for_policies_that_allow_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others, stock vLLM included, have no figures there; the allowed one's stay constant."""
    arguments = ["--model", str(model), "--policy", "h2o:budget=64,rope_beyond=allow"]
    result = plan(capsys, *arguments)
    assert result["contexts"] == [4096, 32768, 131072]
    *others, allowed = result["results"]
    for entry in others:
        beyond = entry["contexts"][1]
        assert beyond == dict.fromkeys(CONTEXT) | {"context": 32768}
    assert result["stock"]["contexts"][2]["requests"] is None
    assert len({(at["blocks"], at["requests"]) for at in allowed["contexts"]}) == 1
    assert allowed["contexts"][2]["ratio_to_full"] == 1024
    assert re.search(r"^full +\d+ +x1\.0 +- +- ", printed(capsys, *arguments), re.MULTILINE)


def test_context_that_no_policy_reaches_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context past the positions is an error that says how to go there."""
    arguments = ["--model", str(model), "--policy", "h2o:budget=64", "--context", "100,8193"]
    line = refused(capsys, *arguments)
    assert "--context 8193 exceeds the model's 8192 positions" in line
    assert "rope_beyond=allow" in line


def test_peak_ends_with_the_positions(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget beyond the model's positions costs what the longest request costs."""
    result = plan(capsys, "--model", str(model), "--policy", "window:budget=100000")
    full, *_, window = result["results"]
    assert window["slots_per_request"] == 8192
    assert window["contexts"] == full["contexts"]


def test_growth_is_shown_where_there_is_no_bound(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text says what `full` costs per token, and what a budget costs at most."""
    text = printed(capsys, "--model", str(model), "--policy", "window:budget=960")
    assert re.search(r"^full +1 per token +1 per 128 +130\.0 KiB/token", text, re.MULTILINE)
    assert re.search(r"^window:budget=960 +1,020 +8 +130\.0 MiB +130\.5 MiB$", text, re.MULTILINE)
    assert "stops growing at budget + interval slots" in text


@pytest.mark.parametrize(
    ("option", "config", "dtype", "noted"),
    [
        ("auto", "bfloat16", "bfloat16", False),
        ("auto", "float16", "float16", False),
        ("auto", "float32", "bfloat16", True),
        ("float32", "bfloat16", "float32", False),
        ("float32", "float8_e4m3fn", "float32", False),
        ("float16", None, "float16", False),
    ],
)
def test_dtype_follows_vllms_auto(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    config: str | None,
    dtype: str,
    noted: bool,
) -> None:
    """`auto` is the config's, except float32; what is given wins."""
    folder = write_config(tmp_path / "model", torch_dtype=config)
    result = plan(capsys, "--model", str(folder), "--policy", "full", "--dtype", option)
    assert result["dtype"] == dtype
    assert result["bytes_per_token"] == (256 << 10 if dtype == "float32" else 128 << 10)
    assert any("float32" in note for note in result["notes"]) == noted


@pytest.mark.parametrize("config", [None, "float8_e4m3fn"])
def test_unknown_dtype_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None
) -> None:
    """`auto` does not guess."""
    folder = write_config(tmp_path / "model", torch_dtype=config)
    assert "give --dtype" in refused(capsys, "--model", str(folder), "--policy", "full")


def test_tensor_parallel_splits_heads(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank holds its share of the KV heads, or one if there are too few, and says so."""
    found = {}
    for ranks in ("1", "4", "16"):
        arguments = ["--model", str(model), "--policy", "h2o:budget=1024"]
        result = plan(capsys, *arguments, "--tensor-parallel", ranks)
        found[ranks] = (result["kv_heads_per_rank"], result["results"][-1]["bytes_per_request"])
        assert any("of one rank" in note for note in result["notes"]) == (ranks != "1")
        assert any("refuses" in note for note in result["notes"]) == (ranks == "16")
    whole = found["1"][1]
    assert found == {"1": (8, whole), "4": (2, whole // 4), "16": (1, whole // 8)}
    line = refused(capsys, *arguments, "--tensor-parallel", "3")
    assert "3 tensor-parallel ranks" in line


def test_a_bulk_prompt_is_planned_as_it_is_held(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request that is all prompt costs what it costs under `full`, and the reader is told."""
    spec = "h2o:budget=64,prefill=bulk"
    result = plan(capsys, "--model", str(model), "--policy", spec, "--context", "1024,4096")
    full, *_, bulk = result["results"]
    assert bulk["policy"] == spec
    assert bulk["bytes_per_request"] is None
    different = {"policy", "budget"}
    assert {key: bulk[key] for key in bulk.keys() - different} == {
        key: full[key] for key in full.keys() - different
    }
    assert any("prefill=bulk holds a whole prompt" in note for note in result["notes"])


def test_memory_that_needs_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that no blocks are promised for a policy that vLLM does not run."""
    assert main(["plan", "--policy", "fam:block=16,segments=1,level=model"]) == 2
    assert "runs in transformers and in the simulator" in capsys.readouterr().err


def test_memory_beside_slots_is_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that infini with an open gate costs whole blocks more than with a closed one."""
    arguments = ("--model", str(model), "--policy", "infini:segment=64")
    closed, opened = (
        plan(capsys, *arguments[:-1], arguments[-1] + gate)["results"][-1]
        for gate in ("", ",gate=0.5")
    )
    assert closed["slots_per_request"] == opened["slots_per_request"] == 64
    for figure in ("blocks_per_request", "dense_bytes_per_request"):
        assert opened[figure] > closed[figure]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["linear_attention"] * 32}, "hybrid"),
        ({"num_hidden_layers": -3}, "num_hidden_layers must be a positive integer, got -3"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
    ],
)
def test_unfit_model_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    """Models without a plain KV cache, and damaged configs, exit with 2 and the reason."""
    folder = write_config(tmp_path / "model", **changes)
    assert reason in refused(capsys, "--model", str(folder), "--policy", "h2o:budget=64")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--policy"),
        (["--policy", "h2o:budget=0"], "budget"),
        (["--policy", "window:budget=64,protect=prompt"], "drop protect=prompt"),
        (["--policy", "full", "--model", "no/such/folder"], "nothing is downloaded"),
        (["--policy", "full", "--memory", "24G"], "units B, KiB"),
        (["--policy", "full", "--memory", "-1GiB"], "--memory"),
        (["--policy", "full", "--memory", "0GiB"], "at least one byte"),
        (["--policy", "full", "--context", "4096,zero"], "4096,32768"),
        (["--policy", "full", "--context", "0"], "positive lengths"),
        (["--policy", "full", "--context", ""], "positive lengths"),
        (["--policy", "full", "--block-size", "0"], "at least 1"),
        (["--policy", "full", "--block-size", str(1 << 21)], "at most 1,048,576"),
        (["--policy", "full", "--dtype", "fp8"], "fp8"),
        (["--policy", "full", "--tensor-parallel", "0"], "at least 1"),
    ],
)
def test_bad_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    """Impossible options exit with 2 and say what was expected."""
    assert reason in refused(capsys, *arguments)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)))
def test_size_is_number_times_unit(number: int, unit: str) -> None:
    """Sizes are exact, binary with an i and decimal without."""
    base, power = 1024 if "i" in unit else 1000, " KMGT".index(unit[0] if unit != "B" else " ")
    assert (
        memory_size(f"{number}{unit}") == memory_size(f" {number} {unit}") == number * base**power
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1024", 1024), ("1.5GiB", 3 << 29), ("0.1KiB", 102), ("1.001KB", 1001), ("80GB", 80 * 10**9)],
)
def test_fraction_of_a_unit_is_exact(text: str, num_bytes: int) -> None:
    """Fractions are read as decimal numbers and rounded down to bytes."""
    assert memory_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1e9", "1 GiB x", "1gib", "0x10", "1" * 400, "nan"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    """Anything else is an argparse error, never a guess."""
    with pytest.raises(argparse.ArgumentTypeError):
        memory_size(text)


def test_contexts_are_sorted_and_unique() -> None:
    """Lengths may come in any order."""
    assert context_lengths("300, 4,300,20") == (4, 20, 300)


def test_markup_in_names_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's name is printed as it is, whatever it looks like to rich."""
    (tmp_path / "[bold]m[").mkdir()
    folder = write_config(tmp_path / "[bold]m[" / "nope]")
    text = printed(capsys, "--model", str(folder), "--policy", "full").replace("\n", "")
    assert "[bold]m[/nope]" in text


def test_notes_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the hosts refuse although the arithmetic holds stands below the tables."""
    folder = write_config(tmp_path / "model", attn_logit_softcapping=30.0)
    text = printed(capsys, "--model", str(folder), "--policy", "full")
    assert "note: the hosts refuse models that cap attention logits" in text


def test_planning_loads_no_heavy_library(model: Path) -> None:
    """A plan takes neither torch nor a host."""
    script = (
        "import sys\nfrom kvpolicy.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    arguments = ["plan", "--model", str(model), "--policy", "h2o:budget=64", "random:budget=64"]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    heavy = {"torch", "numpy", "transformers", "vllm", "kvpolicy_hf", "kvpolicy_vllm"}
    assert not heavy & {*done.stderr.split()}
