"""A policy that fails harms no other request, and its own goes on under a window."""

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    assert_equals_reference,
    chunks_of,
    generate,
    pool_of,
    preemptions,
    reference,
    start_engine,
)
from fixtures.faults import Faulty, FaultyDigest, FaultyWatcher
from fixtures.models import random_llama, random_prompt, save_model
from kvpolicy import registry
from kvpolicy_vllm.book import Account, Book
from kvpolicy_vllm.containment import contain, fallback_of
from kvpolicy_vllm.rows import Row

pytestmark = pytest.mark.vllm

NUM_TOKENS = 20
LAYERS = 2
HEALTHY = ("full", "h2o:budget=48", "window:budget=40")
WINDOW = "window:budget=48"
FIRST_EVICTION = 51


@pytest.fixture(scope="module", autouse=True)
def known():
    """Requests may name the policies that fail."""
    with pytest.MonkeyPatch.context() as patch:
        for policy in (Faulty, FaultyWatcher, FaultyDigest):
            patch.setitem(registry._registered, policy.name, policy)
        yield


@pytest.fixture(scope="module")
def engine(path, known):
    """An engine whose requests bring policies that fail, beside others."""
    allow = ("full", "h2o", "window", "faulty", "faulty_watcher")
    return start_engine(path, "full", allow=allow)


@pytest.fixture(scope="module")
def remembering(path, known):
    """An engine whose requests bring memories that fail."""
    server = "faulty_digest:budget=48,how=none"
    return start_engine(path, server, allow=("faulty_digest", "window"))


def book_of(llm):
    """The accounts of an engine in this process."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return next(iter(layers.values())).impl.engine.book


def prompts_of(model, count):
    """Prompts of unequal lengths, all of which evict under a budget of 48."""
    return [random_prompt(model, 55 + 13 * i, seed=i) for i in range(count)]


def ledgers_of(llm, outputs):
    """The requests' ledgers, checked against their law."""
    requests = kvpolicy_vllm.ledger(llm)["requests"]
    entries = [requests[output.request_id] for output in outputs]
    for entry in entries:
        policy = kvpolicy.parse(entry["policy"])
        assert entry["evicted"] == policy.occupancy.evicted(entry["logical_tokens"])
    return entries


def results_of(llm, outputs):
    """Tokens, retained positions and fault of every request, to be compared."""
    return [
        (
            list(output.outputs[0].token_ids),
            [
                kvpolicy_vllm.retained_positions(llm, output.request_id, layer).tolist()
                for layer in range(LAYERS)
            ],
            entry["fault"],
        )
        for output, entry in zip(outputs, ledgers_of(llm, outputs), strict=True)
    ]


FAILURES = {
    "faulty:budget=48,how=raise": "ValueError: cannot rate these slots",
    "faulty:budget=48,how=nan": "returned NaN",
    "faulty:budget=48,how=some_nan": "returned NaN",
    "faulty:budget=48,how=shape": "must return a tensor",
    "faulty:budget=48,how=complex": "return real numbers",
    "faulty:budget=48,how=nothing": "got NoneType",
    "faulty:budget=48,how=protect": "3 slots must go, but only 0 are not protected",
    "faulty_watcher:budget=48,how=raise": "RuntimeError: cannot look",
    "faulty_watcher:budget=48,how=nan,start=9": "observe() returned NaN",
    "faulty_watcher:budget=48,how=shape,start=50": "observe() must return a tensor",
}


@pytest.mark.parametrize("chunk", [2048, 32])
def test_a_failing_policy_goes_on_as_a_window_among_neighbours(engine, model, chunk):
    """Every kind of failure from the first eviction on equals `window`; neighbours notice nothing.

    The ledger names the policy, the reason and the token, and its law is the policy's.
    """
    specs = list(FAILURES)
    for part in (specs[:5], specs[5:]):
        batch = [*part, *HEALTHY]
        prompts = prompts_of(model, len(batch))
        with chunks_of(engine, chunk), pool_of(engine, 60):
            outputs = generate(engine, prompts, NUM_TOKENS, batch)
            entries = ledgers_of(engine, outputs)
        for prompt, spec, output, entry in zip(prompts, batch, outputs, entries, strict=True):
            stands_in = WINDOW if spec in FAILURES else spec
            assert_equals_reference(engine, output, reference(model, stands_in, prompt, NUM_TOKENS))
            assert kvpolicy.parse(entry["policy"]) == kvpolicy.parse(spec)
            if spec in HEALTHY:
                assert entry["fault"] is None
                continue
            start = getattr(kvpolicy.parse(spec), "start", 0)
            token = FIRST_EVICTION if spec.startswith("faulty:") else max(1, start)
            assert entry["fault"].startswith(f"token {token}, layer 0: ")
            assert FAILURES[spec] in entry["fault"]
            assert entry["fault"].endswith("(2 layers under a window)")


def test_pinned_spans_stay_where_a_policy_fails(engine, model):
    """The window that goes on pins what the policy pinned."""
    [prompt] = prompts_of(model, 1)
    spec = "budget=48,interval=5,protect=(3:7,20:24)"
    [output] = generate(engine, [prompt], NUM_TOKENS, f"faulty:{spec}")
    assert_equals_reference(engine, output, reference(model, f"window:{spec}", prompt, NUM_TOKENS))


@pytest.mark.parametrize("setting", ["prefill=bulk", "protect=prompt"])
def test_prompts_set_apart_stay_so_where_a_policy_fails(engine, model, setting):
    """Laws that follow the prompt go on as they were."""
    [prompt] = prompts_of(model, 1)
    spec = f"budget=12,interval=5,{setting}"
    [output] = generate(engine, [prompt], NUM_TOKENS, f"faulty:{spec}")
    assert_equals_reference(engine, output, reference(model, f"window:{spec}", prompt, NUM_TOKENS))
    assert kvpolicy_vllm.ledger(engine)["requests"][output.request_id]["fault"]


def test_what_a_policy_may_do_is_no_failure(engine, model):
    """Infinite scores are scores: they fall back on the order of positions."""
    specs = [f"faulty:budget=48,sinks=0,how={how}" for how in ("infinite", "least")]
    prompts = prompts_of(model, 2)
    outputs = generate(engine, prompts, NUM_TOKENS, specs)
    for prompt, output, entry in zip(prompts, outputs, ledgers_of(engine, outputs), strict=True):
        assert entry["fault"] is None
        assert_equals_reference(engine, output, reference(model, WINDOW, prompt, NUM_TOKENS))


@pytest.mark.parametrize("name", ["faulty", "faulty_watcher"])
def test_a_policy_that_writes_into_its_view_changes_nothing(engine, model, name):
    """What a policy is shown is its own copy: slots, pages and the other rows stay as they are."""
    prompts = prompts_of(model, 3)
    outputs = generate(engine, prompts, NUM_TOKENS, f"{name}:budget=48,how=scribble")
    for prompt, output, entry in zip(prompts, outputs, ledgers_of(engine, outputs), strict=True):
        assert entry["fault"] is None
        for how in ("scribble", "never"):
            expected = reference(model, f"{name}:budget=48,how={how}", prompt, NUM_TOKENS)
            assert_equals_reference(engine, output, expected)


@pytest.mark.parametrize(
    "setting",
    [
        "picky=true,how=raise",
        "picky=true,how=nan",
        "start=81",
        "start=70,where=1",
        "start=100,where=0,how=complex",
    ],
)
def test_results_do_not_depend_on_the_schedule(engine, model, setting):
    """Alone, in a batch, in any chunks, after preemption: same tokens, sets and faults.

    Rows of one policy fail for some of the requests, at some token, in some layers.
    """
    spec, prompts = f"faulty:budget=48,{setting}", prompts_of(model, 6)
    alone = [generate(engine, [prompt], NUM_TOKENS, spec)[0] for prompt in prompts]
    expected = results_of(engine, alone)
    faults = [fault for _, _, fault in expected]
    assert any(faults)
    if "picky" in setting or "start=100" in setting:
        assert None in faults
    assert results_of(engine, generate(engine, prompts, NUM_TOKENS, spec)) == expected
    with chunks_of(engine, 32):
        assert results_of(engine, generate(engine, prompts, NUM_TOKENS, spec)) == expected
    with pool_of(engine, 12), preemptions(engine) as preempted:
        outputs = generate(engine, prompts, NUM_TOKENS, spec)
        assert results_of(engine, outputs) == expected
    assert preempted, "the pool was large enough for everyone"


def test_the_log_tells_once_and_the_book_counts(engine, model, caplog):
    """Two requests fail in two layers and many steps: two lines, two counts."""
    caplog.set_level(logging.WARNING, "vllm.kvpolicy")
    before = book_of(engine).contained
    outputs = generate(engine, prompts_of(model, 2), NUM_TOKENS, "faulty:budget=48")
    lines = [r.getMessage() for r in caplog.records if "goes on there" in r.getMessage()]
    assert len(lines) == 2
    assert book_of(engine).contained == before + 2
    for line, output in zip(lines, outputs, strict=True):
        assert f"request {output.request_id} under faulty:budget=48" in line
        assert "cannot rate these slots (token 51, layer 0)" in line


MEMORY_FAILURES = {
    "absorb": "cannot take it in",
    "absorb_nan": "absorb() returned NaN",
    "absorb_shape": "absorb() must return",
    "absorb_type": "absorb() must return",
    "attend": "cannot read it",
    "attend_nan": "attend() returned NaN",
    "attend_shape": "attend() must return `output`",
    "reflect": "cannot look back",
    "boundary": "no idea",
}


def test_nobody_reads_a_memory_that_failed(remembering, model):
    """A failing memory stays allotted and unread: its row is a window over its token slots."""
    batch = [f"faulty_digest:budget=48,how={how}" for how in MEMORY_FAILURES]
    prompts = prompts_of(model, len(batch))
    window = "window:budget=44,interval=3"
    for chunk in (2048, 32):
        with chunks_of(remembering, chunk), pool_of(remembering, 20):
            outputs = generate(remembering, prompts, NUM_TOKENS, batch)
            entries = ledgers_of(remembering, outputs)
        for prompt, how, output, entry in zip(
            prompts, MEMORY_FAILURES, outputs, entries, strict=True
        ):
            assert_equals_reference(
                remembering, output, reference(model, window, prompt, NUM_TOKENS)
            )
            assert MEMORY_FAILURES[how] in entry["fault"], how
            assert entry["merged"] == 0
            assert entry["slots_held"] == entry["retained"] + 4


@pytest.mark.parametrize("how", ["absorb", "attend_nan", "reflect", "boundary"])
def test_a_memory_that_fails_later_does_so_in_any_schedule(remembering, model, how):
    """What the memory answered until then stays, whatever was computed together."""
    specs = [f"faulty_digest:budget=48,how={how},start=81", "faulty_digest:budget=48,how=none"] * 2
    prompts = prompts_of(model, 4)
    alone = [
        generate(remembering, [prompt], NUM_TOKENS, spec)[0]
        for prompt, spec in zip(prompts, specs, strict=True)
    ]
    expected = results_of(remembering, alone)
    assert [fault is not None for _, _, fault in expected] == [False, False, True, False]
    for chunk in (2048, 32, 7):
        with chunks_of(remembering, chunk):
            outputs = generate(remembering, prompts, NUM_TOKENS, specs)
            assert results_of(remembering, outputs) == expected


def test_a_count_that_fails_costs_the_count_alone(remembering, model):
    """A ledger is closed inside a step, too: a policy that cannot count does not stop it."""
    [prompt] = prompts_of(model, 1)
    [output] = generate(remembering, [prompt], 2, "faulty_digest:budget=48,how=merged")
    [entry] = ledgers_of(remembering, [output])
    assert "merged() raised ValueError: cannot count" in entry["fault"]
    assert entry["merged"] == 0


def a_row(policy):
    """A row of four tokens that nobody will place."""
    allotment = SimpleNamespace(law=policy.occupancy)
    return Row(0, policy, 0, 4, 10, Account("a", policy, allotment))


def test_only_exceptions_of_policies_are_contained():
    """Interrupts go through, and so does what fails under the fallback or without a policy."""
    book, policy = Book(), Faulty(budget=8)

    def interrupted(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contain([a_row(policy)], 0, interrupted, book)

    def broken(row):
        raise RuntimeError("the host's own")

    with pytest.raises(RuntimeError, match="the host's own"):
        contain([a_row(kvpolicy.parse("full"))], 0, broken, book)
    assert book.contained == 0
    with pytest.raises(RuntimeError, match="the host's own"):
        contain([a_row(policy)], 0, broken, book)


def test_rows_that_fail_only_together_keep_their_policy():
    """A policy that cannot take several rows at once is asked about each."""
    book, rows, seen = Book(), [a_row(Faulty(budget=8)) for _ in range(3)], []
    contain(rows, 0, seen.append, book)
    assert seen == rows
    assert book.contained == 0


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_failing_token_is_found(failing):
    """What comes before it runs under the policy, once; it and the rest under the fallback."""
    book, policy, done = Book(), Faulty(budget=8), []

    def run(row):
        if row.policy == policy and row.total >= 10 + failing:
            raise ValueError("now")
        done.append((row.policy, row.seen, row.total))

    row = a_row(policy)
    contain([row], 5, run, book)
    before = [span for span in done if span[0] == policy]
    assert [token for _, first, last in before for token in range(first, last)] == list(
        range(10, 9 + failing)
    )
    assert done[len(before) :] == [(fallback_of(policy), 9 + failing, 14)]
    assert row.account.faults[5].token == 10 + failing


def test_a_contained_failure_holds_nothing():
    """What a failing policy computed goes at once, without waiting for Python to find cycles."""
    computed = []

    def run(row):
        if isinstance(row.policy, Faulty):
            tensor = torch.zeros(1)
            computed.append(weakref.ref(tensor))
            raise ValueError("now")

    gc.disable()
    try:
        contain([a_row(Faulty(budget=8))], 0, run, Book())
        assert len(computed) > 1
        assert not any(ref() is not None for ref in computed)
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_request_that_is_no_number_leaves_its_neighbours_alone(tmp_path, dtype):
    """One prompt overflows: the others' log-probabilities are the same to the bit.

    Nor do the blocks that it leaves behind harm who gets them next.
    """
    poison = 7
    model = random_llama(num_hidden_layers=LAYERS)
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.inf
    llm = start_engine(save_model(model, tmp_path), "full", dtype=dtype)
    clean = [[t if t != poison else 8 for t in ids] for ids in prompts_of(model, 5)]
    specs = ("h2o:budget=48", "h2o:budget=48", "tova:budget=48", "window:budget=48", "full")

    def run(first):
        outputs = generate(llm, [first, *clean[1:]], NUM_TOKENS, specs, logprobs=2)
        return [
            [{t: entry.logprob for t, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs[1:]
        ], ledgers_of(llm, outputs)

    with pool_of(llm, 20):
        expected, _ = run(clean[0])
        for position in (0, 20, len(clean[0]) - 1):
            poisoned = [*clean[0][:position], poison, *clean[0][position + 1 :]]
            found, entries = run(poisoned)
            assert found == expected
            assert [entry["fault"] for entry in entries] == [None] * len(specs)
        again, _ = run(clean[0])
        assert again == expected
        for pages in book_of(llm).layers.values():
            pages.runs.fill_(torch.nan)
        again, _ = run(clean[0])
        assert again == expected
