"""Samples in transformers: what a batch gives, a sample alone, the oracle and generation give."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import kvpolicy
from fixtures.caches import small_llama
from fixtures.families import FAMILIES
from fixtures.models import certified_prompts, random_prompt
from kvpolicy import parse
from kvpolicy.bundled import heldout_text
from kvpolicy.evaluation.cells import CellFile
from kvpolicy.evaluation.run import evaluate
from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy.evaluation.tasks.ppl import parts_of
from kvpolicy_hf import PolicyCache
from kvpolicy_hf.checkpoint import Checkpoint, load_checkpoint
from kvpolicy_hf.closed_loop import ClosedLoop
from oracles.llama import ModelOracle

SPECS = (
    "full",
    "window:budget=16",
    "h2o:budget=16",
    "h2o:budget=16,prefill=bulk",
    "tova:budget=16,interval=5",
    "snapkv:budget=16,window=4",
    "window:budget=8,protect=prompt",
    "centroid:budget=16",
)


def unequal_samples() -> list[Sample]:
    """Four samples of three lengths, two prompts and different targets."""
    lengths = ((60, 40, 41), (60, 30, 58), (43, 40, 40), (52, 30, 35))
    return [
        Sample(
            tokens=random_prompt(small_llama(), length, seed),
            prompt_tokens=prompt,
            targets=[Target(first=first, last=length, group=(0, 1))],
        )
        for seed, (length, prompt, first) in enumerate(lengths)
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_unequal_samples_gives_what_each_gives_alone(spec):
    """Neighbours, their lengths and what fills shorter rows up change no prediction."""
    host, policy = ClosedLoop(small_llama()), parse(spec)
    together = host.predict(unequal_samples(), policy)
    for sample, found in zip(unequal_samples(), together, strict=True):
        [alone] = host.predict([sample], policy)
        assert found.shape == (sample.num_predicted, small_llama().config.vocab_size)
        assert torch.allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize(
    "spec", ["full", "window:budget=16", "h2o:budget=16", "tova:budget=16,interval=5"]
)
def test_predictions_are_the_oracles(spec):
    """Every log-probability of a text equals the float64 definition's, token by token."""
    [prompt] = certified_prompts(small_llama(), [spec], [44], max_new_tokens=12)
    tokens = prompt.ids + prompt.run.tokens[:-1]
    sample = Sample(tokens=tokens, prompt_tokens=0, targets=parts_of(1, len(tokens)))
    [found] = ClosedLoop(small_llama()).predict([sample], parse(spec))
    oracle = ModelOracle(small_llama(), spec)
    expected = np.stack([oracle.feed(token) for token in tokens[:-1]])
    expected -= np.logaddexp.reduce(expected, axis=-1, keepdims=True)
    assert np.abs(found.numpy() - expected).max() < 1e-3


@cache
def bundled() -> Checkpoint:
    """The bundled model."""
    return load_checkpoint(kvpolicy.bundled_model())


def passkeys(question, context=160, count=6):
    """Pass keys in bundled prose."""
    source = Source(heldout_text(), bundled().encode, bundled().start)
    return Passkey(question=question).samples(source, context, count, 0)


@pytest.mark.parametrize("question", ["seen", "unseen"])
@pytest.mark.parametrize("spec", ["full", "window:budget=96", "h2o:budget=64,prefill=bulk"])
def test_an_exact_answer_is_what_generation_writes(spec, question):
    """With the answer as input, a sample is right exactly when greedy generation finds the key."""
    samples, policies = passkeys(question), [parse("full"), parse(spec)]
    run = evaluate(ClosedLoop(bundled().model), {160: samples}, policies)[1]
    right = [m.right[0] == s.num_predicted for m, s in zip(run.measured, samples, strict=True)]
    written = []
    for sample in samples:
        answer = sample.tokens[-sample.num_predicted :]
        ids = torch.tensor([sample.tokens[: -len(answer)]])
        cache = PolicyCache(bundled().model, spec, prompt_tokens=sample.prompt_tokens)
        generated = bundled().model.generate(
            ids, past_key_values=cache, max_new_tokens=len(answer), do_sample=False
        )
        written.append(generated[0, ids.shape[1] :].tolist() == answer)
    assert right == written
    assert spec != "full" or any(right)


def test_a_file_of_another_model_is_refused(tmp_path):
    """A changed weight is another model: its finished cells are not taken for this one's."""
    path, host = tmp_path / "cells.jsonl", ClosedLoop(small_llama())
    sample = unequal_samples()[0]
    policies = [parse("full")]
    settings = {"model": host.fingerprint()}
    evaluate(host, {60: [sample]}, policies, CellFile(path, settings))
    weight = small_llama().lm_head.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = before + 1
    other = {"model": host.fingerprint()}
    with torch.no_grad():
        weight[0, 0] = before
    with pytest.raises(kvpolicy.PolicyError, match="model"):
        CellFile(path, other)
    assert {"model": host.fingerprint()} == settings


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_full_cache_grow_with_its_tokens_in_every_family(family):
    """Sizes are read off the attention modules: configs of some families do not name them."""
    host = ClosedLoop(FAMILIES[family]())
    one, ten = (host.bytes_per_request(parse("full"), tokens, 0) for tokens in (1, 10))
    assert 0 < 10 * one == ten


def test_the_pages_python_runs_as_it_stands(capsys):
    """What docs/how-to/evaluate.md shows prints a share of pairs for each of its policies."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "evaluate.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
    shares = json.loads(capsys.readouterr().out)
    assert len(shares) == 2
    assert all(0 <= share <= 1 for share in shares)


def test_only_predicted_tokens_cost_logits():
    """A batch's rows are bounded by the logits that are kept, not by the text's length."""
    host = ClosedLoop(bundled().model)
    assert host.batch_size(passkeys("seen")) == 8
    long = Sample(tokens=[0] * 9000, prompt_tokens=0, targets=parts_of(1, 9000))
    assert host.batch_size([long]) == 1
