"""Grid files: what entries become, and every way in which they can be wrong."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.sweeping import make_grid
from kvpolicy import KVPolicyError, PolicyError, parse
from kvpolicy.cli.sweep.grid import MOST_BYTES, read_grid
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy.evaluation.tasks.ppl import Perplexity

HEAD = 'policies = ["window"]\nbudgets = [8, 16]\n'
REPLAY = HEAD + '[[replay]]\ntraces = ["t.kvtrace"]\n'
EVAL = HEAD + "[[eval]]\n"


def test_entries_are_products_of_sources_and_policies(tmp_path):
    """One entry per trace, and per model and length, with baselines; paths from the grid on."""
    text = (
        'policies = ["window", "tova:budget=4"]\nbudgets = [8, 16]\n'
        '[[replay]]\ntraces = ["a.kvtrace", "deep/b.kvtrace"]\nlayers = "0,2:4"\noracle = true\n'
        '[[eval]]\nmodels = ["bundled", "m"]\ncontexts = [64, 32]\n'
        'task = "passkey"\nquestion = "unseen"\nsamples = 3\n'
        'budgets = []\npolicies = ["h2o:budget=8,prefill=bulk"]\n'
    )
    entries = read_grid(make_grid(tmp_path, text))
    replays, evals = entries[:2], entries[2:]
    assert [entry.trace for entry in replays] == [
        tmp_path / "a.kvtrace",
        tmp_path / "deep/b.kvtrace",
    ]
    assert replays[0].layers == (0, 2, 3)
    assert replays[0].oracle
    assert replays[0].details
    specs = "full sinks:budget=8 sinks:budget=16 window:budget=8 window:budget=16 tova:budget=4"
    assert replays[0].policies == [parse(spec) for spec in specs.split()]
    assert [(entry.model_name, entry.context) for entry in evals] == [
        ("bundled", 32),
        ("bundled", 64),
        ("m", 32),
        ("m", 64),
    ]
    assert evals[2].model == tmp_path / "m"
    assert evals[0].model.name == "model"
    assert evals[0].task == Passkey(question="unseen")
    assert [str(policy) for policy in evals[0].policies] == [
        "full",
        "sinks:budget=8,prefill=bulk",
        "h2o:budget=8,prefill=bulk",
    ]


def test_an_entry_has_the_defaults_of_its_command(tmp_path):
    """An eval entry alone is `kvpolicy eval` on the bundled model and text."""
    (entry,) = read_grid(make_grid(tmp_path, EVAL))
    assert (entry.model_name, entry.context, entry.samples, entry.seed) == ("bundled", 1024, 20, 0)
    assert entry.text is None
    assert entry.task == Perplexity()


WRONG = {
    "no entry": (HEAD, "nothing to do"),
    "no TOML": ("budgets = [1,, 2]", "is not TOML"),
    "an unknown key": (HEAD + "budget = 1\n" + REPLAY[len(HEAD) :], "unknown key 'budget'; its"),
    "an unknown entry": (REPLAY + '[[report]]\nhtml = "x"\n', "unknown key 'report'"),
    "an unknown key of an entry": (
        REPLAY + "layer = 1\n",
        r"\[\[replay\]\] 1: unknown key 'layer'",
    ),
    "another command's key": (REPLAY + "samples = 3\n", "unknown key 'samples'"),
    "the second entry": (REPLAY + "[[replay]]\n", r"\[\[replay\]\] 2: traces is missing"),
    "one trace as a string": (HEAD + '[[replay]]\ntraces = "t"\n', "traces must be a list"),
    "no trace in the list": (HEAD + "[[replay]]\ntraces = []\n", "traces is missing"),
    "an entry that is no array": (HEAD + "[replay]\n", "replay must be entries, each below"),
    "budgets that are text": ('budgets = ["8"]\n' + EVAL[len(HEAD) :], "budgets must be a list"),
    "a budget of nothing": ("budgets = [0]\n[[eval]]\n", "budgets must be a list of integers"),
    "true for a number": ("budgets = [true]\n[[eval]]\n", "budgets must be a list of integers"),
    "no policies": ("budgets = [8]\n[[eval]]\n", r"\[\[eval\]\] 1: no policies"),
    "a bad spec": ('policies = ["windw:budget=8"]\n[[eval]]\n', r"1: unknown policy 'windw'"),
    "no budget": ('policies = ["window"]\n[[eval]]\n', "window needs budget"),
    "budgets without use": ('policies = ["full"]\nbudgets = [8]\n[[eval]]\n', "none does"),
    "an unknown level": (REPLAY + 'level = "closed"\n', "level must be one of layer-local"),
    "layers as a list": (REPLAY + "layers = [0, 1]\n", "layers must be a string"),
    "layers backwards": (REPLAY + 'layers = "4:2"\n', "layers must be a string such as"),
    "a flag as a number": (REPLAY + "oracle = 1\n", "oracle must be true or false, got 1"),
    "an unknown task": (EVAL + 'task = "chess"\n', "task must be one of ppl, passkey"),
    "a setting of other tasks": (
        EVAL + "pairs = 3\n",
        "pairs is for task recall or reuse, and ppl",
    ),
    "a question unheard": (
        EVAL + 'task = "passkey"\nquestion = "seen"\n',
        "streams: it evicts the text before it reads the question",
    ),
    "a context of nothing": (EVAL + "contexts = [4]\n", "integers of at least 8"),
    "half a sample": (EVAL + "samples = 0.5\n", "samples must be an integer of at least 1"),
    "a seed below zero": (EVAL + "seed = -1\n", "seed must be an integer of at least 0"),
    "a path with a NUL": (EVAL + 'text = "a\\u0000b"\n', "is no path"),
    "an integer without end": (EVAL + "seed = " + "9" * 9000 + "\n", "is not TOML"),
    "a huge integer": (EVAL + f"seed = {1 << 40}\n", "seed must be an integer"),
    "deep nesting": ("budgets = " + "[" * 5000 + "\n", "nested too deeply"),
    "a date": (EVAL + "text = 2026-01-01\n", "text must be a string"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_place(tmp_path, what):
    """Each mistake is one error that names the file, what it found and what it expected."""
    text, message = WRONG[what]
    path = make_grid(tmp_path, text)
    with pytest.raises(PolicyError, match=message) as raised:
        read_grid(path)
    assert str(raised.value).startswith(path)


def test_what_is_no_grid_file_is_refused(tmp_path):
    """A folder, a pipe that nobody writes to, bytes that are no text, and too many of them."""
    pipe, binary, large = tmp_path / "pipe", tmp_path / "binary", tmp_path / "large"
    os.mkfifo(pipe)
    binary.write_bytes(bytes(range(256)))
    large.write_bytes(b"#" * (MOST_BYTES + 1))
    for path, message in (
        (tmp_path, "no such regular file"),
        (tmp_path / "missing", "no such regular file"),
        (pipe, "no such regular file"),
        (binary, "is not TOML"),
        (large, "too many for a grid"),
    ):
        with pytest.raises(PolicyError, match=message):
            read_grid(path)


VALUES = st.recursive(
    st.integers(-9, 99) | st.booleans() | st.sampled_from(["", "window", "8", "ppl", "bundled"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
KEYS = "policies budgets traces models text task contexts samples seed level layers pairs x".split()
TABLES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)


def written(table):
    """A table as TOML."""
    shown = {True: "true", False: "false"}
    return "".join(
        f"{key} = {shown[value] if type(value) is bool else repr(value)}\n".replace(
            "True", "true"
        ).replace("False", "false")
        for key, value in table.items()
    )


@given(st.sampled_from(["replay", "eval"]), TABLES, TABLES)
def test_no_grid_breaks_the_reader(tmp_path_factory, kind, top, entry):
    """Any keys with any values are read, or refused with an error of ours."""
    folder = tmp_path_factory.mktemp("grid")
    try:
        found = read_grid(make_grid(folder, f"{written(top)}[[{kind}]]\n{written(entry)}"))
    except KVPolicyError:
        return
    assert found
    assert all(found[0].policies)
