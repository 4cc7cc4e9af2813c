"""A task end to end in vLLM: the answers it generates score as `kvpolicy eval` scores them."""

import pytest

import kvpolicy
from fixtures.engines import generate, start_engine
from kvpolicy import parse
from kvpolicy.bundled import heldout_text
from kvpolicy.evaluation.run import evaluate
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy_hf.checkpoint import load_checkpoint
from kvpolicy_hf.closed_loop import ClosedLoop

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONTEXT, COUNT = 512, 20
SPECS = (
    "full",
    "window:budget=256",
    "h2o:budget=128",
    "tova:budget=192,prefill=bulk",
    "h2o:budget=256,prefill=bulk",
    "snapkv:budget=256,window=16",
    "window:budget=64,protect=prompt",
)


def test_generated_answers_score_as_teacher_forced_ones():
    """Sample by sample, under every policy: vLLM writes the key exactly where eval counts it."""
    checkpoint = load_checkpoint(kvpolicy.bundled_model())
    source = Source(heldout_text(), checkpoint.encode, checkpoint.start)
    samples = Passkey(question="seen").samples(source, CONTEXT, COUNT, 0)
    policies = [parse(spec) for spec in SPECS]
    runs = evaluate(ClosedLoop(checkpoint.model), {CONTEXT: samples}, policies)
    engine = start_engine(kvpolicy.bundled_model(), "full", max_num_batched_tokens=256)
    shares = {}
    for spec, run in zip(SPECS, runs, strict=True):
        answers = [sample.tokens[-sample.num_predicted :] for sample in samples]
        prompts = [sample.tokens[: -sample.num_predicted] for sample in samples]
        outputs = generate(engine, prompts, max(map(len, answers)), spec)
        found = [
            list(output.outputs[0].token_ids)[: len(answer)] == answer
            for output, answer in zip(outputs, answers, strict=True)
        ]
        expected = [m.right[0] == len(a) for m, a in zip(run.measured, answers, strict=True)]
        assert found == expected, spec
        shares[spec] = sum(found) / COUNT
    assert shares["full"] == shares["window:budget=64,protect=prompt"] > shares["window:budget=256"]
    assert shares["window:budget=256"] > 0
