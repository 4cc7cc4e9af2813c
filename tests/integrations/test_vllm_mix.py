"""Policies by layers in vLLM: as transformers where all layers hold as much, refused elsewhere."""

import pytest

import kvpolicy_vllm
from fixtures.engines import Cases, assert_equals_reference, generate, start_engine
from fixtures.models import random_llama, random_prompt, save_model
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy_vllm.config import check_policy, request_policy

pytestmark = pytest.mark.vllm

SPEC = (
    "mix:layers=(0:window;1:h2o:recent=4;2:tova:scope=head;3-:sinks:sinks=2),budget=40,interval=5"
)
FAULTY = "mix:layers=(0-1:h2o;2-:fixtures.faults.Faulty:how=raise,start=60),budget=40,interval=5"


class FewCases(Cases):
    """Fewer prompts: every eviction of four layers has to be certified."""

    lengths = (30, 61, 97, 120)


@pytest.fixture(scope="module")
def model():
    """A random Llama of four layers."""
    return random_llama()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """The model on disk."""
    return save_model(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cases(model) -> Cases:
    """Certified prompts with their answers."""
    return FewCases(model)


def test_a_batch_in_chunks_equals_transformers(path, cases):
    """Four layers under four policies: vLLM's tokens, and all positions, are transformers'."""
    engine = start_engine(path, SPEC, max_num_batched_tokens=32)
    prompts, expected = zip(*cases.of(SPEC), strict=True)
    outputs = generate(engine, prompts, Cases.num_tokens)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)
    ledgers = kvpolicy_vllm.ledger(engine)["requests"]
    assert {ledgers[output.request_id]["policy"] for output in outputs} == {SPEC}
    assert all(ledgers[output.request_id]["fault"] is None for output in outputs)


def test_a_part_that_fails_is_contained_in_its_layers(path, model):
    """Where one part raises a window goes on; layers of the other part never notice."""
    engine = start_engine(path, FAULTY, max_num_batched_tokens=64)
    [output] = generate(engine, [random_prompt(model, 120, 0)], Cases.num_tokens)
    ledger = kvpolicy_vllm.ledger(engine)["requests"][output.request_id]
    assert (
        "layer 2: ValueError: cannot rate these slots (2 layers under a window)" in ledger["fault"]
    )
    newest = list(range(ledger["logical_tokens"] - ledger["retained"], ledger["logical_tokens"]))
    for layer in (2, 3):
        kept = kvpolicy_vllm.retained_positions(engine, output.request_id, layer).tolist()
        assert all(head == newest for head in kept)
    untouched = kvpolicy_vllm.retained_positions(engine, output.request_id, 0).tolist()
    assert all(head != newest for head in untouched)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mix:layers=(0-1:full;2-:h2o),budget=40", "layers hold different numbers of slots"),
        ("mix:layers=(0-1:h2o;2-:h2o:budget=20),budget=40", "give all parts one budget"),
        ("mix:layers=(0:compressive;1-:compressive:fn=max),budget=40", "a memory cannot be a part"),
        ("mix:layers=(0-:compressive),budget=40", "a memory cannot be a part"),
    ],
)
def test_what_needs_blocks_of_its_own_is_refused(spec, told):
    """Layers that hold unequally many slots, or memories, are refused before an engine starts."""
    import kvpolicy

    with pytest.raises(UnsupportedError) as caught:
        check_policy(kvpolicy.parse(spec))
    assert told in str(caught.value)


def test_a_request_cannot_bring_a_mix():
    """Parts could be import paths: a request's mix is refused before anything is imported."""
    from vllm import SamplingParams

    spec = "mix:layers=(0-:no.such.module.Class:budget=8)"
    params = SamplingParams(extra_args={"kv_policy": spec})
    with pytest.raises(PolicyError, match="policies by layers are for the server's own policy"):
        request_policy(params, ("mix",))
