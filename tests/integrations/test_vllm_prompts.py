"""Prompts set apart in vLLM: attended as a whole and evicted once, or kept and shared."""

from itertools import cycle

import pytest
import torch
from vllm import LLM, SamplingParams

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    BLOCK_SIZE,
    Cases,
    assert_equals_reference,
    chunks_of,
    generate,
    pool_of,
    preemptions,
    reference,
    scheduler_of,
    start_engine,
)
from fixtures.models import random_prompt
from fixtures.teacher import Teacher

pytestmark = pytest.mark.vllm

NUM_TOKENS = Cases.num_tokens
SERVERS = {"bulk": "h2o:budget=64,prefill=bulk", "keep": "h2o:budget=16,protect=prompt"}
SPECS = {
    "bulk": (
        "window:budget=24,interval=40,protect=(3:7,20:24),prefill=bulk",
        "sinks:budget=48,interval=1,prefill=bulk",
        "h2o:budget=40,interval=1,scope=layer,sinks=2,prefill=bulk",
        "h2o:budget=48,group_pool=max,score=mean,recent=8,prefill=bulk",
        "tova:budget=40,interval=5,scope=head,recent=1,prefill=bulk",
        "random:budget=48,seed=3,prefill=bulk",
        "snapkv:budget=48,window=8",
        "keydiff:budget=48,prefill=bulk",
    ),
    "keep": (
        "window:budget=5,interval=1,protect=prompt",
        "sinks:budget=8,protect=prompt",
        "h2o:budget=8,interval=3,protect=prompt",
        "h2o:budget=6,interval=1,scope=layer,protect=prompt",
        "tova:budget=6,protect=prompt",
        "random:budget=7,interval=4,protect=prompt",
        "knorm:budget=8,protect=prompt",
        "keydiff:budget=8,interval=3,protect=prompt",
    ),
}


@pytest.fixture(scope="module", params=SERVERS)
def mode(request) -> str:
    """What is made of prompts. Front ends know one engine, so that one follows the other."""
    return request.param


keep_only = pytest.mark.parametrize("mode", ["keep"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def cases(model) -> Cases:
    """Certified prompts with transformers' answers."""
    return Cases(model)


@pytest.fixture(scope="module")
def engine(path, mode) -> LLM:
    """A server of one kind; requests bring their own policies."""
    return start_engine(path, SERVERS[mode])


def run(llm: LLM, cases: Cases, spec: str) -> list[int | None]:
    """Generate after all prompts of a policy as transformers does; the tokens found cached."""
    prompts, expected = zip(*cases.of(spec), strict=True)
    outputs = generate(llm, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(llm, output, answer)
    return [output.num_cached_tokens for output in outputs]


@pytest.fixture
def plans(monkeypatch) -> list:
    """All plans made meanwhile."""
    from kvpolicy_vllm import builder, plan

    made: list[plan.Plan] = []

    def make_plan(*args):
        made.append(plan.make_plan(*args))
        return made[-1]

    monkeypatch.setattr(builder, "make_plan", make_plan)
    return made


@pytest.mark.parametrize("index", range(8))
def test_a_batch_of_unequal_lengths_equals_transformers(engine, cases, mode, index):
    """Whole prompts, chunks and prompts from the prefix cache give the same."""
    spec, nothing = SPECS[mode][index], [0] * len(Cases.lengths)
    whole_blocks = [(n - 1) // BLOCK_SIZE * BLOCK_SIZE for n in Cases.lengths]
    engine.reset_prefix_cache()
    assert run(engine, cases, spec) == nothing
    assert run(engine, cases, spec) == (whole_blocks if mode == "keep" else nothing)
    for size in (128, 32):
        engine.reset_prefix_cache()
        with chunks_of(engine, size):
            assert run(engine, cases, spec) == nothing


def test_policies_may_mix_in_one_batch(engine, cases, mode):
    """Every row follows its own policy and budget, over prompts that others have cached too."""
    specs = SPECS[mode]
    mixed = [cases.of(spec)[-1 - index] for index, spec in enumerate(specs)]
    outputs = generate(engine, [ids for ids, _ in mixed], NUM_TOKENS, specs)
    for output, (_, expected) in zip(outputs, mixed, strict=True):
        assert_equals_reference(engine, output, expected)


def test_preemption_and_recompute_change_nothing(engine, cases, mode, monkeypatch):
    """Requests lose their blocks in prompts and in answers, and compute both again in one chunk."""
    from kvpolicy_vllm import builder

    crossings: list[tuple[int, int]] = []
    make_plan = builder.make_plan

    def watch(rows, *args):
        crossings.extend(
            (row.seen, row.total) for row in rows if row.seen < row.allotment.prompt < row.total
        )
        return make_plan(rows, *args)

    monkeypatch.setattr(builder, "make_plan", watch)
    preempted: list[tuple[int, int]] = []
    tight = cycle([(9, 64), (10, 64), (10, 32)])
    for spec, (num_blocks, size) in zip(SPECS[mode], tight, strict=False):
        with pool_of(engine, num_blocks), chunks_of(engine, size), preemptions(engine) as times:
            run(engine, cases, spec)
        preempted += times
    assert any(computed < prompt for prompt, computed in preempted), "never within a prompt"
    assert any(computed > prompt for prompt, computed in preempted), "never within an answer"
    assert crossings, "no step went past a prompt's end"
    assert (mode == "bulk") or any(seen > 0 for seen, _ in crossings), "none found its own prompt"


def test_blocks_follow_the_law_before_and_after_the_prompts_end(engine, model, mode, monkeypatch):
    """At every step a request holds what the law says; the ledger says so too."""
    manager = scheduler_of(engine).kv_cache_manager
    law = kvpolicy.parse(SERVERS[mode]).occupancy.of_prompt(500)
    held: dict[int, int] = {}
    allocate = manager.allocate_slots

    def watch(request, num_new_tokens, *args, **kwargs):
        blocks = allocate(request, num_new_tokens, *args, **kwargs)
        total = request.num_computed_tokens + num_new_tokens
        held[total] = len(manager.get_block_ids(request.request_id)[0])
        return blocks

    monkeypatch.setattr(manager, "allocate_slots", watch)
    with chunks_of(engine, 128):
        [output] = generate(engine, [random_prompt(model, 500, seed=1)], 40)
    assert held == {n: law.num_blocks(n, BLOCK_SIZE) for n in (128, 256, 384, *range(500, 540))}
    entry = kvpolicy_vllm.ledger(engine)["requests"][output.request_id]
    assert entry["logical_tokens"] == 539
    assert entry["blocks_held"] == held[539] == {"bulk": 3, "keep": 17}[mode]
    assert entry["retained"] == law.held(539) == {"bulk": 67, "keep": 516}[mode]
    assert entry["evictions"] == law.evictions(539)


def test_aborted_requests_leave_nothing_behind(engine, cases, mode):
    """Requests end within their prompt and their answer; others do not notice."""
    spec, pool = SPECS[mode][2], manager_of(engine).block_pool
    free = pool.get_num_free_blocks()
    ids, expected = cases.of(spec)[-1]
    with chunks_of(engine, 64):
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_policy": spec},
        )
        for name in ("within", "after", "whole"):
            engine.llm_engine.add_request(name, {"prompt_token_ids": ids}, parameters)
        engine.llm_engine.step()
        engine.llm_engine.abort_request(["within"])
        for _ in range(6):
            engine.llm_engine.step()
        engine.llm_engine.abort_request(["after"])
        finished = []
        while engine.llm_engine.has_unfinished_requests():
            finished += [each for each in engine.llm_engine.step() if each.finished]
    assert [output.request_id for output in finished] == ["whole"]
    assert_equals_reference(engine, finished[0], expected)
    assert pool.get_num_free_blocks() == free


def manager_of(llm: LLM):
    """What hands out an engine's blocks."""
    return scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0]


def test_prompts_are_attended_in_place(engine, cases, mode, plans):
    """Only policies that add up attention look at a whole prompt; nobody does if it is kept."""
    for spec in SPECS[mode]:
        plans.clear()
        run(engine, cases, spec)
        walks = mode == "bulk" and spec.startswith(("h2o", "snapkv"))
        assert any(plan.walks for plan in plans) == walks, spec


@keep_only
def test_shared_blocks_stay_as_they_are(engine, cases):
    """Requests that evict, of any policy, never write to the blocks of a prompt they share."""
    spec = SPECS["keep"][2]
    engine.reset_prefix_cache()
    ids, expected = cases.of(spec)[-1]
    outputs = generate(engine, [ids, ids, ids], NUM_TOKENS, spec)  # two wait for the first's blocks
    for output in outputs:
        assert_equals_reference(engine, output, expected)
    shared = manager_of(engine)._find_within_prompt(hashes_of(engine, ids), len(ids))[0][0]
    assert len(shared) == len(ids) // BLOCK_SIZE == 3
    before = contents(engine, [block.block_id for block in shared])
    for each in SPECS["keep"]:
        outputs = generate(engine, [ids] * 3, 60, each)
        assert [output.num_cached_tokens for output in outputs] == [96] * 3
    after = contents(engine, [block.block_id for block in shared])
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def hashes_of(llm: LLM, ids: list[int]):
    """The hashes under which a prompt's blocks are cached."""
    from vllm.v1.request import Request

    hasher = llm.llm_engine.engine_core.engine_core.request_block_hasher
    return Request("x", ids, SamplingParams(max_tokens=1), None, block_hasher=hasher).block_hashes


def contents(llm: LLM, blocks: list[int]) -> list[torch.Tensor]:
    """Keys, values and policy state of blocks, in every layer."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    book = next(iter(context.values())).impl.engine.book
    return [
        state[blocks].clone()
        for pages in book.layers.values()
        for state in (pages.runs, pages.positions, pages.accumulated)
    ]


@keep_only
def test_a_second_turn_shares_the_first_turns_prompt(engine, model):
    """Blocks with generated tokens are no prompt of the next turn: they are computed again."""
    spec = SPECS["keep"][2]
    first = random_prompt(model, 70, seed=5)
    [output] = generate(engine, [first], 60, spec)
    second = first + list(output.outputs[0].token_ids) + random_prompt(model, 9, seed=6)
    [again] = generate(engine, [second], NUM_TOKENS, spec)
    assert again.num_cached_tokens == 64
    assert_equals_reference(engine, again, reference(model, spec, second, NUM_TOKENS))


def test_log_probabilities_of_prompts_are_those_of_a_full_cache(engine, cases, model, mode):
    """A prompt that is set apart sees all of itself, also in chunks and once it is cached."""
    for spec in SPECS[mode]:
        ids, expected = cases.of(spec)[-1]
        teacher = Teacher(model, spec)
        teacher.feed(ids)
        scores = teacher.scores[range(len(ids) - 1), ids[1:]]
        for size in (2048, 32):
            with chunks_of(engine, size):
                [output] = generate(engine, [ids], NUM_TOKENS, spec, prompt_logprobs=0)
            assert_equals_reference(engine, output, expected)
            entries = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            found = torch.tensor([entry[token].logprob for token, entry in entries])
            torch.testing.assert_close(found, scores, rtol=0, atol=1e-4)


@keep_only
def test_a_reset_prefix_cache_is_empty(engine, cases):
    """Nothing is found after it, and requests that it stops in between start again."""
    spec = SPECS["keep"][2]
    ids, expected = cases.of(spec)[-1]
    generate(engine, [ids], NUM_TOKENS, spec)
    assert engine.reset_prefix_cache()
    core = engine.llm_engine
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_policy": spec},
    )
    core.add_request("stopped", {"prompt_token_ids": ids}, parameters)
    for _ in range(5):
        core.step()
    with preemptions(engine) as preempted:
        assert engine.reset_prefix_cache(reset_running_requests=True)
    assert preempted == [(len(ids), len(ids) + 4)]
    finished = [each for _ in range(NUM_TOKENS) for each in core.step() if each.finished]
    assert [output.request_id for output in finished] == ["stopped"]
    assert finished[0].num_cached_tokens == 0
    assert_equals_reference(engine, finished[0], expected)


@pytest.mark.parametrize("mode", SERVERS)
def test_additional_config_alone_runs_them(path, cases, mode):
    """Without a worker that knows requests the prompt's length comes with the row."""
    spec = SPECS[mode][3]
    engine = start_engine(path, additional_config={"kv_policy": spec})
    prompts, expected = zip(*cases.of(spec), strict=True)
    for _ in range(2):
        outputs = generate(engine, prompts, NUM_TOKENS)
        for output, answer in zip(outputs, expected, strict=True):
            assert list(output.outputs[0].token_ids) == answer.tokens
    context = engine.llm_engine.vllm_config.compilation_config.static_forward_context
    book = next(iter(context.values())).impl.engine.book
    assert not book.faults
    law, heads = kvpolicy.parse(spec).occupancy, 2 * 2
    evicted = {law.of_prompt(n).evicted(n + NUM_TOKENS - 1) * heads for n in Cases.lengths}
    assert evicted <= {account.evicted_cells for account in book.accounts.values()}
