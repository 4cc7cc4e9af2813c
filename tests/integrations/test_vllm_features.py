"""What vLLM offers beside plain generation computes the same under policies that evict.

One engine serves all of it, with a tokenizer, priorities and prompts as embeddings. Its blocks
are allotted for the server's budget, and requests bring further policies.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
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
from fixtures.models import random_llama, random_prompt, save_model
from fixtures.teacher import answer, read

pytestmark = pytest.mark.vllm

NUM_TOKENS = Cases.num_tokens
SERVER = "h2o:budget=64"
SPECS = (
    "window:budget=24",
    "sinks:budget=32,interval=1",
    "h2o:budget=32,interval=3",
    "tova:budget=24,scope=layer",
)
NOISE = 1e-4
"""Largest difference of log-probabilities that float32 rounding explains, as in the soak."""

ignores_a_warning_of_xgrammar = pytest.mark.filterwarnings(
    "ignore:max_rollback_tokens is deprecated:DeprecationWarning"  # vLLM sets it
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random Llama for the bundled model's tokens."""
    return random_llama(num_hidden_layers=2, vocab_size=2048)


@pytest.fixture(scope="module")
def cases(model) -> Cases:
    """Certified prompts with their answers."""
    return Cases(model)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory) -> LLM:
    """An engine that can do everything that is tried here."""
    path = save_model(model, tmp_path_factory.mktemp("llama"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(kvpolicy.bundled_model(), name), path)
    return start_engine(
        path,
        SERVER,
        skip_tokenizer_init=False,
        scheduling_policy="priority",
        enable_prompt_embeds=True,
    )


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's."""
    return AutoTokenizer.from_pretrained(kvpolicy.bundled_model())


def ask(spec: str, num_tokens: int = NUM_TOKENS, **sampling) -> SamplingParams:
    """Greedy parameters under a policy."""
    return SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, **sampling},
        max_tokens=num_tokens,
        extra_args={"kv_policy": spec},
    )


def run(llm: LLM, most_steps: int = 400) -> list[RequestOutput]:
    """Step until nobody waits; everything that came out, in order."""
    outputs: list[RequestOutput] = []
    for _ in range(most_steps):
        if not llm.llm_engine.has_unfinished_requests():
            return outputs
        outputs += llm.llm_engine.step()
    raise AssertionError(f"requests are still running after {most_steps} steps")


def assert_scores(found: Sequence, expected: torch.Tensor, tokens: Sequence[int]) -> None:
    """Entries hold each token and the five best ones, with the numbers of `expected`."""
    assert len(found) == len(expected) == len(tokens)
    for entry, row, token in zip(found, expected, tokens, strict=True):
        numbers = torch.tensor([each.logprob for each in entry.values()])
        torch.testing.assert_close(numbers, row[[*entry]], rtol=0, atol=NOISE)
        best = row.topk(5).values
        ranked = sorted(entry.values(), key=lambda each: each.rank)[:5]
        numbers = torch.tensor([each.logprob for each in ranked])
        torch.testing.assert_close(numbers, best, rtol=0, atol=NOISE)
        assert token in entry


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [2048, 32])
def test_log_probabilities_equal_transformers(engine, cases, model, spec, size):
    """Those of answers and of prompts, whose tokens see what they would see if streamed."""
    prompts = [ids for ids, _ in cases.of(spec)[-3:]]
    with chunks_of(engine, size):
        outputs = generate(engine, prompts, NUM_TOKENS, spec, logprobs=5, prompt_logprobs=5)
    for ids, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        scores = read(model, spec, ids + tokens[:-1]).scores
        assert output.prompt_logprobs[0] is None
        assert_scores(output.prompt_logprobs[1:], scores[: len(ids) - 1], ids[1:])
        assert_scores(output.outputs[0].logprobs, scores[len(ids) - 1 :], tokens)


@pytest.mark.parametrize("spec", SPECS)
def test_several_answers_to_a_prompt_are_so_many_requests(engine, model, spec):
    """Each sampled answer has the numbers and the slots of its own text, and its own ledger."""
    ids = random_prompt(model, 90, seed=1)
    parameters = ask(spec, temperature=1.0, n=3, logprobs=5)
    [output] = engine.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    texts = [list(choice.token_ids) for choice in output.outputs]
    assert len({tuple(text) for text in texts}) == 3
    requests = kvpolicy_vllm.ledger(engine)["requests"]
    law = kvpolicy.parse(spec).occupancy
    for choice, tokens in zip(output.outputs, texts, strict=True):
        teacher = read(model, spec, ids + tokens[:-1])
        assert_scores(choice.logprobs, teacher.scores[len(ids) - 1 :], tokens)
        name = f"{choice.index}_{output.request_id}"
        for layer, positions in enumerate(teacher.retained()):
            assert torch.equal(kvpolicy_vllm.retained_positions(engine, name, layer), positions)
        assert requests[name]["evictions"] == law.evictions(len(ids) + NUM_TOKENS - 1) > 0


@ignores_a_warning_of_xgrammar
@pytest.mark.parametrize("spec", SPECS)
def test_structured_output_is_the_best_that_the_grammar_allows(engine, model, tokenizer, spec):
    """A regular expression masks the logits that the policy leaves, and nothing else."""
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    fits = torch.tensor([re.fullmatch("[a-f ]+", text) is not None for text in texts])
    assert 7 <= fits.sum() < 200
    ids = random_prompt(model, 80, seed=2)
    constraint = StructuredOutputsParams(regex="[a-f ]{999}")
    parameters = ask(spec, structured_outputs=constraint)
    [output] = engine.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)

    def choose(logits: torch.Tensor, _: list[int]) -> int:
        return int(logits.where(fits, -torch.inf).argmax())

    assert list(output.outputs[0].token_ids) == answer(model, spec, ids, NUM_TOKENS, choose)


@ignores_a_warning_of_xgrammar
def test_structured_output_obeys_choices_and_schemas(engine, model):
    """Requests under every policy, in one batch, answer what they are given to choose from."""
    choices = StructuredOutputsParams(choice=["window", "sinks"])
    schema = StructuredOutputsParams(json={"enum": ["window", 7, None]})
    parameters = [
        ask(spec, ignore_eos=False, structured_outputs=constraint)
        for spec in SPECS
        for constraint in (choices, schema)
    ]
    prompts = [{"prompt_token_ids": random_prompt(model, 80, seed=3)} for _ in parameters]
    texts = [
        output.outputs[0].text for output in engine.generate(prompts, parameters, use_tqdm=False)
    ]
    assert {*texts[::2]} <= {"window", "sinks"}
    assert all(json.loads(text) in ("window", 7, None) for text in texts[1::2])


@pytest.mark.parametrize("spec", SPECS)
def test_an_urgent_request_takes_blocks_from_the_least_urgent(engine, cases, spec):
    """Arriving last it is not preempted, but who has time is; all equal their solo runs."""
    chosen = {"patient": (cases.of(spec)[-1], 9), "calm": (cases.of(spec)[-2], 5)}
    core = engine.llm_engine
    # Three blocks each, and one for the urgent request, which needs another at its 33rd token.
    with pool_of(engine, 7), preemptions(engine) as preempted:
        for name, ((ids, _), priority) in chosen.items():
            core.add_request(name, {"prompt_token_ids": ids}, ask(spec), priority=priority)
        outputs = [each for _ in range(3) for each in core.step()]
        chosen["urgent"] = cases.of(spec)[1], 0
        ids = chosen["urgent"][0][0]
        core.add_request("urgent", {"prompt_token_ids": ids}, ask(spec), priority=0)
        outputs += run(engine)
    assert {prompt for prompt, _ in preempted} == {len(chosen["patient"][0][0])}
    finished = {each.request_id: each for each in outputs if each.finished}
    assert [*finished][-1] == "patient"
    for name, ((_, expected), _) in chosen.items():
        assert_equals_reference(engine, finished[name], expected)


@pytest.mark.parametrize("spec", SPECS)
def test_streamed_answers_add_up(engine, cases, spec):
    """Pieces of tokens and of text, put together, are the answer in one piece."""
    chosen = cases.of(spec)[-2:]
    prompts = [{"prompt_token_ids": ids} for ids, _ in chosen]
    wholes = engine.generate(prompts, ask(spec), use_tqdm=False)
    parameters = ask(spec, output_kind=RequestOutputKind.DELTA)
    for index, (ids, _) in enumerate(chosen):
        engine.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
    outputs = run(engine)
    for index, (_, expected) in enumerate(chosen):
        pieces = [each.outputs[0] for each in outputs if each.request_id == str(index)]
        assert len(pieces) == NUM_TOKENS
        assert [token for piece in pieces for token in piece.token_ids] == expected.tokens
        assert "".join(piece.text for piece in pieces) == wholes[index].outputs[0].text


def test_beam_search_equals_transformers(engine, model):
    """Every step sends every beam as a prompt of its own, which reads it as if streamed."""
    width, num_steps = 3, 6
    ids = random_prompt(model, 100, seed=4)
    parameters = BeamSearchParams(beam_width=width, max_tokens=num_steps, ignore_eos=True)
    [found] = engine.beam_search([{"prompt_token_ids": ids}], parameters)
    beams: list[tuple[float, list[int]]] = [(0.0, ids)]
    for _ in range(num_steps):
        longer = []
        for total, text in beams:
            best = read(model, SERVER, text).scores[-1].topk(2 * width)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            longer += [(total + score, [*text, token]) for score, token in pairs]
        beams = sorted(longer, key=lambda beam: beam[0], reverse=True)[:width]
    assert [sequence.tokens for sequence in found.sequences] == [text for _, text in beams]
    for sequence, (total, _) in zip(found.sequences, beams, strict=True):
        assert sequence.cum_logprob == pytest.approx(total, abs=num_steps * NOISE)


@pytest.mark.parametrize("spec", SPECS)
def test_aborted_requests_leave_nothing_behind(engine, cases, spec):
    """Requests end within their prompt and their answer; others do not notice."""
    pool = scheduler_of(engine).kv_cache_manager.block_pool
    free, core = pool.get_num_free_blocks(), engine.llm_engine
    ids, expected = cases.of(spec)[-1]
    with chunks_of(engine, 64):
        for name in ("within", "after", "whole"):
            core.add_request(name, {"prompt_token_ids": ids}, ask(spec))
        core.step()
        core.abort_request(["within"])
        for _ in range(6):
            core.step()
        core.abort_request(["after"])
        [whole] = [each for each in run(engine) if each.finished]
    assert whole.request_id == "whole"
    assert_equals_reference(engine, whole, expected)
    assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize("spec", SPECS)
def test_a_second_turn_reads_the_whole_conversation(engine, model, spec):
    """Nothing of the first turn is found again, and the second equals transformers."""
    first = random_prompt(model, 70, seed=5)
    [output] = generate(engine, [first], NUM_TOKENS, spec)
    second = first + list(output.outputs[0].token_ids) + random_prompt(model, 9, seed=6)
    [again] = generate(engine, [second], NUM_TOKENS, spec)
    assert again.num_cached_tokens == 0
    assert_equals_reference(engine, again, reference(model, spec, second, NUM_TOKENS))


@pytest.mark.parametrize("spec", SPECS)
def test_biases_and_penalties_change_logits_only(engine, model, spec):
    """Greedy choices among steered logits are those of transformers."""
    ids = random_prompt(model, 80, seed=7)
    bias = dict.fromkeys(range(0, 2048, 7), 2.5)
    parameters = ask(spec, logit_bias=bias, repetition_penalty=1.5)
    [output] = engine.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)

    def choose(logits: torch.Tensor, text: list[int]) -> int:
        logits = logits.clone()
        logits[[*bias]] += 2.5
        said = sorted(set(text))
        logits[said] = torch.where(logits[said] > 0, logits[said] / 1.5, logits[said] * 1.5)
        return int(logits.argmax())

    assert list(output.outputs[0].token_ids) == answer(model, spec, ids, NUM_TOKENS, choose)


@pytest.mark.parametrize("spec", SPECS)
def test_bad_words_and_early_stops_are_never_chosen(engine, cases, model, tokenizer, spec):
    """Greedy choices are the best ones of what `bad_words` and `min_tokens` leave."""
    ids, expected = cases.of(spec)[-1]
    words = {token: tokenizer.decode([token]) for token in expected.tokens}
    word, said = next(  # vLLM takes a word without the blank before it, and then with one
        (text, token)
        for token, text in words.items()
        if text == text.strip() and tokenizer.encode(text, add_special_tokens=False) == [token]
    )
    parameters = ask(spec, bad_words=[word])
    parameters.update_from_tokenizer(engine.get_tokenizer())
    bad = [sequence[0] for sequence in parameters.bad_words_token_ids if len(sequence) == 1]
    assert said in bad
    early = ask(spec, stop_token_ids=[expected.tokens[0]], min_tokens=NUM_TOKENS)
    by_word, by_length = engine.generate(
        [{"prompt_token_ids": ids}] * 2, [parameters, early], use_tqdm=False
    )

    def best_without(tokens: list[int]) -> list[int]:
        def choose(logits: torch.Tensor, _: list[int]) -> int:
            return int(logits.index_fill(0, torch.tensor(tokens), -torch.inf).argmax())

        return answer(model, spec, ids, NUM_TOKENS, choose)

    assert list(by_word.outputs[0].token_ids) == best_without(bad)
    assert list(by_length.outputs[0].token_ids) == best_without([expected.tokens[0]])


@pytest.mark.parametrize("spec", SPECS)
def test_stops_cut_the_answer(engine, cases, tokenizer, spec):
    """A stop string and a stop token end an answer where they first appear in it."""
    ids, expected = cases.of(spec)[-1]
    text, stop = tokenizer.decode(expected.tokens), tokenizer.decode(expected.tokens[9:11])
    token = expected.tokens[9]
    parameters = [ask(spec, stop=[stop]), ask(spec, stop_token_ids=[token])]
    by_text, by_token = engine.generate([{"prompt_token_ids": ids}] * 2, parameters, use_tqdm=False)
    assert by_text.outputs[0].text == text[: text.index(stop)]
    cut = expected.tokens[: expected.tokens.index(token) + 1]
    assert list(by_token.outputs[0].token_ids) == cut
    assert by_text.outputs[0].finish_reason == by_token.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_as_embeddings_is_that_prompt(engine, cases, model, spec):
    """Its length is known to the worker, so that it evicts as the tokens' prompt does."""
    ids, expected = cases.of(spec)[-1]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(ids))
    prompts = [{"prompt_embeds": embedded}, {"prompt_token_ids": ids}]
    for output in engine.generate(prompts, ask(spec), use_tqdm=False):
        assert_equals_reference(engine, output, expected)


def test_steps_are_not_scheduled_ahead(engine):
    """The CPU platform turns off what would schedule a step before its tokens are known."""
    assert engine.llm_engine.vllm_config.scheduler_config.async_scheduling is False
