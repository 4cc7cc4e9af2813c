"""`kvpolicy eval`: right figures on the bundled model, baselines beside them, fixed JSON keys."""

import json
import math
from pathlib import Path

import pytest
import torch

from kvpolicy import PolicyError, bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.cli.arguments import with_baselines, with_budgets

KEYS = {
    "policy",
    "budget",
    "ppl",
    "passkey",
    "recall",
    "logit_kl",
    "top1_agreement",
    "tokens",
    "seconds",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(heldout_text()[:2500], encoding="utf-8")
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run the command with `--json -` and return what it printed."""
    assert main(["eval", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def bytes_per_slot() -> int:
    """Float32 keys and values of the bundled model, and 12 bytes of state, in every layer."""
    config = json.loads(Path(bundled_model(), "config.json").read_text(encoding="utf-8"))
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return heads * (2 * config["head_dim"] * 4 + 12)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["window:budget=64"], ["full", "sinks:budget=64", "window:budget=64"]),
        (["full", "sinks:budget=64"], ["full", "sinks:budget=64"]),
        (["full"], ["full"]),
        (["window:budget=4"], ["full", "window:budget=4"]),
        (
            ["h2o:budget=8,protect=prompt", "snapkv:budget=8,window=2", "knorm:budget=8"],
            [
                "full",
                "sinks:budget=8,protect=prompt",
                "sinks:budget=8,prefill=bulk",
                "sinks:budget=8",
                "h2o:budget=8,protect=prompt",
                "snapkv:budget=8,window=2",
                "knorm:budget=8",
            ],
        ),
        (
            ["tova:budget=8", "h2o:budget=8", "tova:budget=9"],
            [
                "full",
                "sinks:budget=8",
                "sinks:budget=9",
                "tova:budget=8",
                "h2o:budget=8",
                "tova:budget=9",
            ],
        ),
    ],
)
def test_full_and_sinks_stand_beside_any_policy(specs: list[str], expected: list[str]) -> None:
    """Every report has the full cache, and sinks at each budget, once."""
    assert [str(policy) for policy in with_baselines(specs)] == expected


def test_perplexity_of_the_full_cache_is_the_models_own(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figure for `full` equals a plain forward of transformers without any of our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvpolicy

    result = evaluate(capsys, "--policy", "full", "--text", str(text), "--context", "128")
    model = AutoModelForCausalLM.from_pretrained(kvpolicy.bundled_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(kvpolicy.bundled_model())
    ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    bos, losses = tokenizer.bos_token_id, []
    with torch.no_grad():
        for first in range(0, len(ids) - 126, 127):
            window = torch.tensor([[bos, *ids[first : first + 127]]])
            losses.append(model(window, labels=window).loss.item())
    (full,) = result["results"]
    assert full["tokens"] == 127 * len(losses)
    assert full["ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_perplexity_json_has_the_contracts_keys(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every result has all keys; the full cache agrees with itself and evicting costs."""
    result = evaluate(
        capsys, "--policy", "window:budget=16", "--text", str(text), "--context", "256"
    )
    assert {"schema", "semantics", "model", "context", "results"} <= result.keys()
    assert result["context"] == 256
    full, sinks, window = result["results"]
    assert all(entry.keys() >= KEYS for entry in (full, sinks, window))
    assert [e["policy"] for e in (full, sinks, window)] == [
        "full",
        "sinks:budget=16",
        "window:budget=16",
    ]
    assert (full["budget"], window["budget"]) == (None, 16)
    assert full["logit_kl"] == pytest.approx(0.0, abs=1e-6)
    assert full["top1_agreement"] == 1.0
    assert window["logit_kl"] > 0.01
    slot = bytes_per_slot()  # interval 1
    assert window["bytes_per_request"] == sinks["bytes_per_request"] == 17 * slot
    assert full["bytes_per_request"] == 256 * slot
    assert window["passkey"] is None


def test_a_budget_that_is_never_reached_changes_nothing(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an eviction a policy's perplexity is the full cache's."""
    result = evaluate(capsys, "--policy", "h2o:budget=512", "--text", str(text), "--context", "128")
    full, _, h2o = result["results"]
    assert h2o["ppl"] == pytest.approx(full["ppl"], rel=1e-5)


def test_a_prompt_is_read_densely_and_not_scored(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what follows a prompt counts; bulk keeps more of it than stream, but not all."""
    arguments = ("--text", str(text), "--context", "128", "--prompt-len", "96")
    specs = [f"h2o:budget=16,{x}" for x in ("prefill=bulk", "prefill=stream", "protect=prompt")]
    result = evaluate(capsys, "--policy", *specs, "window:budget=32,protect=prompt", *arguments)
    full, *_, bulk, stream, kept, whole = result["results"]
    windows = full["tokens"] // 32
    assert all(entry["tokens"] == 32 * windows for entry in result["results"])
    assert 0 < kept["logit_kl"] < bulk["logit_kl"] < stream["logit_kl"]
    assert whole["ppl"] == pytest.approx(full["ppl"], rel=1e-6)  # all 32 predictions fit
    slot = bytes_per_slot()
    assert stream["bytes_per_request"] == 17 * slot
    assert bulk["bytes_per_request"] == 96 * slot
    assert kept["bytes_per_request"] == (96 + 17) * slot
    assert result["prompt_len"] == 96


def test_scoring_behind_a_prompt_is_scoring_the_end(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt of one token is the window's first one: the figures are those without a prompt."""
    arguments = ("--policy", "h2o:budget=16", "--text", str(text), "--context", "64")
    told, untold = (evaluate(capsys, *arguments, *x) for x in (("--prompt-len", "1"), ()))
    for one, other in zip(told["results"], untold["results"], strict=True):
        assert (one["ppl"], one["tokens"]) == (other["ppl"], other["tokens"])


def test_passkeys_are_asked_within_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """The question belongs to the prompt: whoever keeps all prompts answers like the full cache."""
    specs = ("window:budget=64,protect=prompt", "h2o:budget=64,prefill=bulk", "window:budget=64")
    arguments = ("--task", "passkey", "--context", "256", "--samples", "8")
    result = evaluate(capsys, "--policy", *specs, *arguments)
    full, *_, kept, bulk, window = result["results"]
    assert kept["passkey"] == full["passkey"] == 1.0
    assert bulk["passkey"] >= window["passkey"]
    assert window["bytes_per_request"] < bulk["bytes_per_request"] < kept["bytes_per_request"]


def test_passkeys_are_scored_exactly_and_repeatably(capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed gives the same answers; the shares are counts over the prompts."""
    arguments = ("--task", "passkey", "--policy", "window:budget=32", "--context", "192")
    first, second = (
        evaluate(capsys, *arguments, "--samples", "8", "--seed", "3") for _ in range(2)
    )
    for entry, again in zip(first["results"], second["results"], strict=True):
        assert entry["passkey"] == again["passkey"]
        assert (entry["passkey"] * 8).is_integer()
        assert entry["ppl"] is None
        assert entry["tokens"] == again["tokens"] > 0


def test_every_task_reports_its_figure_and_curve(capsys: pytest.CaptureFixture[str]) -> None:
    """Each task fills its own key, groups its targets and leaves the full cache ahead or equal."""
    for task, by in (("recall", "place"), ("needle", "depth"), ("reuse", "lag")):
        arguments = ("--task", task, "--context", "320", "--samples", "4")
        result = evaluate(capsys, "--policy", "window:budget=32", *arguments)
        full, _, window = result["results"]
        assert 0 <= window[task] <= 1
        assert sum(point["tokens"] for point in window["curve"]) == window["tokens"]
        assert all(by in point for point in window["curve"])
        assert window["logit_kl"] > full["logit_kl"] == 0
    arguments = ("--task", "repeat", "--context", "320", "--samples", "4")
    full, _, window = evaluate(capsys, "--policy", "window:budget=32", *arguments)["results"]
    assert window["repeat"] > 1.5 * full["repeat"]
    assert window["ppl_ratio"][0] > 1.5


def test_the_prompts_end_matters_to_policies_that_wait_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen or unseen changes what bulk eviction predicts, and nothing else; JSON says who saw."""
    specs = ("snapkv:budget=64,window=16", "h2o:budget=64")
    arguments = ("--task", "passkey", "--context", "256", "--samples", "4", "--policy", *specs)
    seen, unseen = (
        {entry["policy"]: entry for entry in result["results"]}
        for question in ([], ["--question", "unseen"])
        for result in [evaluate(capsys, *arguments, *question)]
    )
    bulk, stream = specs
    assert abs(seen[bulk]["logit_kl"] - unseen[bulk]["logit_kl"]) > 0.01
    for spec in (stream, "full"):
        assert seen[spec]["logit_kl"] == unseen[spec]["logit_kl"]
    assert [seen[spec]["question"] for spec in specs] == ["seen", "unseen"]
    assert [unseen[spec]["question"] for spec in specs] == ["unseen", "unseen"]


def test_budgets_complete_the_specs_that_lack_one() -> None:
    """Complete specs stay, the others are run at every budget."""
    specs = ["h2o", "tova:scope=head", "full", "window:budget=8", "fam:block=8,slots=8"]
    assert with_budgets(specs, [32, 64]) == [
        "h2o:budget=32",
        "h2o:budget=64",
        "tova:scope=head,budget=32",
        "tova:scope=head,budget=64",
        "full",
        "window:budget=8",
        "fam:block=8,slots=8,budget=32",
        "fam:block=8,slots=8,budget=64",
    ]
    assert with_budgets(["h2o:budget=0", "h2o"], [8]) == ["h2o:budget=0", "h2o:budget=8"]
    assert with_budgets(["h2o"], []) == ["h2o"]
    with pytest.raises(PolicyError, match="none does"):
        with_budgets(["h2o:budget=8"], [32])


def test_a_sweep_prints_policies_by_budget_and_writes_its_files(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One table per figure with a column per budget; CSV, plot and JSON have every policy."""
    files = [str(tmp_path / name) for name in ("ppl.csv", "ppl.svg", "ppl.json")]
    arguments = ["eval", "--policy", "window", "h2o", "--budgets", "16,32", "--text", str(text)]
    targets = ("--csv", files[0], "--plot", files[1], "--json", files[2])
    assert main([*arguments, "--context", "128", *targets]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "perplexity"
    assert lines[1].split() == ["slots", "16", "32"]
    assert [line.split()[0] for line in lines[2:6]] == ["sinks", "window", "h2o", "full"]
    entries = json.loads(Path(files[2]).read_text("utf-8"))["results"]
    assert len(entries) == 1 + 2 * 3
    by_policy = {entry["policy"]: entry for entry in entries}
    assert lines[4].split()[1] == f"{by_policy['h2o:budget=16']['ppl']:.2f}"
    assert "h2o:budget=32" in Path(files[0]).read_text("utf-8")
    assert Path(files[1]).read_text("utf-8").startswith("<?xml")


def test_a_resumed_evaluation_gives_the_same_figures(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that lost its last cells gives the figures of the whole run; other settings exit 2."""
    path = tmp_path / "cells.jsonl"
    arguments = ("--policy", "h2o:budget=16", "--text", str(text), "--context", "128")
    whole = evaluate(capsys, *arguments, "--resume", str(path))
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    path.write_bytes(b"".join(lines[:2]))
    again = evaluate(capsys, *arguments, "--resume", str(path))
    for before, after in zip(whole["results"], again["results"], strict=True):
        assert {**before, "seconds": None} == {**after, "seconds": None}
    others = ["--text", str(text), "--context", "64", "--resume", str(path)]
    assert main(["eval", "--policy", "h2o:budget=16", *others]) == 2
    error = capsys.readouterr().err
    assert "context [128], now [64]" in error
    assert error.count("\n") == 1


def test_several_contexts_make_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    """Pass keys by position and length: a point for each, and figures over all of them."""
    arguments = ("--task", "passkey", "--samples", "5", "--policy", "window:budget=64")
    result = evaluate(capsys, *arguments, "--context", "192,128")
    assert (result["context"], result["contexts"]) == (192, [128, 192])
    [*_, window] = result["results"]
    assert [point["context"] for point in window["curve"]] == [128] * 5 + [192] * 5
    mean = sum(point["passkey"] for point in window["curve"]) / 10
    assert window["passkey"] == pytest.approx(mean)


def test_text_goes_to_stdout_without_json(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a table with every policy is printed."""
    arguments = ["eval", "--policy", "tova:budget=32", "--text", str(text), "--context", "128"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("full", "sinks:budget=32", "tova:budget=32", "ppl"))


def test_a_narrow_terminal_gets_what_matters_most(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 columns nothing is cut off: sizes, speeds and long curves are left out instead."""
    monkeypatch.setattr("kvpolicy.cli.output.PIPED_WIDTH", 80)
    arguments = ["eval", "--policy", "tova:budget=32", "--text", str(text), "--context", "128"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "policy ppl against full sinks KL top-1".split()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in "".join(lines)
    assert not any("by position" in line for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "h2o:budget=64", "--context", "100000"],
        ["--policy", "h2o:budget=64", "--context", "3"],
        ["--policy", "h2o:budget=64", "--samples", "0"],
        ["--policy", "h2o:budget=64", "--task", "other"],
        ["--policy", "h2o:budget=64", "--task", "passkey", "--context", "10"],
        ["--policy", "h2o:budget=64", "--model", "no/such/model"],
        ["--policy", "h2o:budget=64,prefill=bulk"],
        ["--policy", "h2o:budget=64,protect=prompt"],
        ["--policy", "h2o:budget=64", "--context", "64", "--prompt-len", "64"],
        ["--policy", "h2o:budget=64", "--task", "passkey", "--prompt-len", "64"],
        ["--policy", "h2o:budget=64", "--task", "passkey", "--question", "seen"],
        ["--policy", "h2o:budget=64", "--question", "unseen"],
        ["--policy", "h2o:budget=64", "--task", "passkey", "--pairs", "4"],
        ["--policy", "h2o:budget=64", "--task", "recall", "--pairs", "501"],
        ["--policy", "h2o:budget=64", "--budgets", "32"],
        ["--policy", "h2o", "--budgets", "0"],
        ["--policy", "h2o"],
        ["--policy", "full", "--plot", "full.svg"],
        ["--policy", "h2o:budget=64", "--resume", "no/such/folder/cells.jsonl"],
        ["--policy", "h2o:budget=64", "--context", "64,x"],
        ["--policy"],
    ],
)
def test_impossible_request_exits_with_2(
    arguments: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be evaluated is bad usage, said without a traceback."""
    assert main(["eval", *arguments, "--text", str(text)]) == 2
    assert "Traceback" not in capsys.readouterr().err
