"""`kvpolicy demo`: its parts, and the whole against real vLLM."""

import json
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy import Ledger
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.cli.demo import NEW_TOKENS, PROMPT_TOKENS, differences, make_passages
from kvpolicy.cli.demo_passkey import Search, show
from kvpolicy.cli.highlight import highlight
from kvpolicy.cli.output import Output
from kvpolicy.passage import Passage, kept_shares
from kvpolicy_hf.greedy import GreedyRun
from kvpolicy_vllm.trial import Generation, Speed

KEYS = {
    "policy",
    "parity",
    "blocks_per_request",
    "bytes_per_request",
    "max_concurrency",
    "tokens_per_second",
    "ratio_to_stock",
    "ppl",
}
RETAINED = [[[0, 2], [1, 2]], [[0, 2], [2, 3]]]
"""Two layers, two KV heads."""


def passage() -> Passage:
    """Four tokens: the first one, a word, and a character that takes two."""
    return Passage("one é", [0, 5, 6, 7], [(0, 0), (0, 3), (3, 5), (4, 5)])


def test_kept_share_counts_layers_and_heads() -> None:
    """A token's share is the fraction of (layer, head) pairs that hold it."""
    assert kept_shares(RETAINED, 4) == [0.5, 0.25, 1.0, 0.25]


def test_brackets_mark_kept_tokens_without_a_terminal() -> None:
    """Piped output marks what at least half of the heads keep, and shows all characters once."""
    shown = highlight(passage(), [1.0, 0.25, 1.0, 0.0], is_terminal=False)
    assert shown.plain == "one[ é]"


def test_colours_mark_tokens_on_a_terminal() -> None:
    """On a terminal the text itself is unchanged and runs are styled by their share."""
    shown = highlight(passage(), [1.0, 0.25, 1.0, 0.0], is_terminal=True)
    assert shown.plain == "one é"
    assert [str(span.style) for span in shown.spans] == ["yellow", "bold green"]


def runs(tokens: list[int], retained: list) -> tuple[Generation, list[GreedyRun]]:
    """One request, as vLLM and as transformers report it."""
    ledger = Ledger("window:budget=2", 4, 2, 2, 2, 1, 1, 1, 2, 0.0)
    generation = Generation(
        policy="window:budget=2",
        max_concurrency=1.0,
        tokens=[[7, 8]],
        retained=[RETAINED],
        ledgers=[ledger.as_dict()],
    )
    return generation, [GreedyRun(tokens, retained, ledger)]


def test_equal_runs_are_parity() -> None:
    """Same tokens and same sets: nothing to report."""
    assert differences(*runs([7, 8], RETAINED)) == []


def test_different_token_is_reported_with_its_place() -> None:
    """A token that differs breaks parity."""
    assert differences(*runs([7, 9], RETAINED)) == ["request 0: tokens differ from new token 1 on"]


def test_different_retained_set_is_reported_with_its_layer() -> None:
    """One position of one head that differs breaks parity."""
    assert differences(*runs([7, 8], [RETAINED[0], [[0, 2], [1, 3]]])) == [
        "request 0: retained sets differ in layers 1"
    ]


def test_speed_ratio_is_the_median_of_pairs() -> None:
    """Each round is compared with stock vLLM in the same round."""
    speed = Speed(policy="full", tokens_per_second=[50.0, 10.0, 90.0], stock=[100.0, 10.0, 100.0])
    assert speed.ratio == 0.9


def test_prompts_have_their_lengths_and_spell_their_text() -> None:
    """Prompts begin with the model's first token, at a paragraph, and their spans cover it."""
    from kvpolicy_hf.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(kvpolicy.bundled_model())
    made = make_passages(checkpoint, heldout_text(), PROMPT_TOKENS)
    assert tuple(len(p.tokens) for p in made) == PROMPT_TOKENS
    for prompt in made:
        assert prompt.tokens[:1] == checkpoint.start
        assert checkpoint.decode(prompt.tokens) == prompt.text
        assert prompt.spans[-1][1] == len(prompt.text)


def test_answers_of_nothing_but_spaces_are_shown_as_blank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An answer without a visible character is told from a cell without an answer."""
    show(Output(), [Search(None, ["123", "456"], ["123", ""], [])])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ["stock", "vLLM", "123", "(blank)", "1", "of", "2"]


@pytest.mark.parametrize("arguments", [["--budget", "2"], ["--rounds", "0"], ["--json"]])
def test_bad_arguments_exit_with_2(arguments: list[str]) -> None:
    """Impossible sizes are usage errors."""
    assert main(["demo", *arguments]) == 2


@pytest.mark.slow
@pytest.mark.vllm
def test_demo_runs_real_vllm_with_parity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo on the bundled model: parity, the law's blocks, and the contract's keys."""
    target = tmp_path / "demo.json"
    assert main(["demo", "--rounds", "1", "--windows", "1", "--json", str(target)]) == 0
    result = json.loads(target.read_text("utf-8"))
    assert result["schema"] == 1
    assert [entry["policy"].partition(":")[0] for entry in result["results"]] == [
        "full",
        "window",
        "sinks",
        "h2o",
        "tova",
    ]
    full, *others = result["results"]
    for entry in result["results"]:
        assert entry.keys() >= KEYS
        assert entry["parity"] is True, entry["differences"]
        assert entry["tokens_per_second"] > 0
        assert entry["ppl"] > 1
    longest = max(PROMPT_TOKENS) + NEW_TOKENS
    assert full["blocks_per_request"] == -(-(longest - 1) // 32)
    for entry in others:
        assert entry["blocks_per_request"] == 4  # 96 + 6 slots
        assert entry["bytes_per_request"] < full["bytes_per_request"] / 6
        assert entry["max_concurrency"] > 200 * result["stock"]["max_concurrency"]
    stock, window, snapkv = result["passkey"]
    assert stock["answers"] == stock["keys"]
    assert window["found"] <= 1  # the last key may lie among the newest tokens
    assert snapkv["found"] > len(snapkv["keys"]) / 2
    assert "vLLM writes:" in capsys.readouterr().out
