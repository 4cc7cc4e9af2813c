"""`kvpolicy eval`: right figures on the bundled model, baselines beside them, fixed JSON keys."""

import json
import math
from pathlib import Path

import pytest
import torch

from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.cli.arguments import with_baselines

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
    # 4 layers, 2 KV heads, K and V of 64 float32 numbers, 12 bytes of state; interval 1
    slot = 4 * 2 * (2 * 64 * 4 + 12)
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
    slot = 4 * 2 * (2 * 64 * 4 + 12)
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


def test_passkey_prompts_spread_over_the_depth() -> None:
    """Keys lie evenly from the beginning to the end, and prompts fit the context."""
    import kvpolicy
    from kvpolicy_hf.checkpoint import load_checkpoint
    from kvpolicy_hf.passkey import make_questions

    checkpoint = load_checkpoint(kvpolicy.bundled_model())
    questions = make_questions(checkpoint, heldout_text(), context=256, samples=20)
    assert [question.depth for question in questions] == [(i + 0.5) / 20 for i in range(20)]
    assert all(len(q.prompt) + len(q.answer) <= 256 for q in questions)
    assert len({tuple(q.prompt) for q in questions}) == 20


def test_text_goes_to_stdout_without_json(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a table with every policy is printed."""
    arguments = ["eval", "--policy", "tova:budget=32", "--text", str(text), "--context", "128"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("full", "sinks:budget=32", "tova:budget=32", "ppl"))


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
        ["--policy"],
    ],
)
def test_impossible_request_exits_with_2(
    arguments: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be evaluated is bad usage, said without a traceback."""
    assert main(["eval", *arguments, "--text", str(text)]) == 2
    assert "Traceback" not in capsys.readouterr().err
