"""Memories in vLLM: the same tokens, positions and ledgers as in transformers."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import BLOCK_SIZE, Reference, assert_equals_reference, generate, start_engine
from fixtures.models import LOGIT_MARGIN, random_llama, random_prompt, save_model
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy_hf import PolicyCache
from kvpolicy_vllm.allotment import PageShape
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.frontend import announce

pytestmark = pytest.mark.vllm

NUM_TOKENS = 24
LENGTHS = (1, 9, 20, 24, 50, 56, 83, 120)
SLOTS = (
    "bswa:block=12,segments=2",
    "bswa:block=12,segments=2,sinks=3",
    "bswa:block=16,segments=0",
    "compressive:budget=36,memory=12",
    "compressive:budget=36,memory=0.25,fn=max,rate=2,interval=8,bias=none",
    "compressive:budget=36,memory=10,fn=most-used,interval=6",
    "compressive:budget=36,memory=12,fn=attention,interval=9,sinks=2",
    "compressive:budget=36,memory=12,fn=conv,interval=9",
    "compressive:budget=36,memory=12,min_similarity=0.62",
    "centroid:budget=36,slots=8,interval=4",
    "centroid:budget=72,slots=40,interval=5,sinks=2,bias=none",
    "fam:block=8,segments=2,slots=8",
    "fam:block=8,segments=1,slots=6,sinks=2,bias=none",
    "infini:segment=24",
    "h2o:budget=48",
)
"""Policies of requests on a server that reserves memory slots."""

NUMBERS = (
    "infini:segment=24,gate=0.3",
    "infini:segment=40,gate=0.6,update=delta",
    "infini:segment=16,gate=calibrated",
    "infini:segment=11,gate=closed",
    "bswa:block=12,segments=2,sinks=3",
    "tova:budget=40",
)
"""Policies of requests on a server that reserves blocks for numbers."""

SERVERS = {
    "compressive:budget=96,memory=40,interval=24": SLOTS,
    "infini:segment=48,gate=0.5": NUMBERS,
}
CASES = [(server, spec) for server, specs in SERVERS.items() for spec in specs]
CHUNKS = (2048, 128, 32)


class Answer(NamedTuple):
    """What transformers does with a prompt.

    Attributes:
        ids: The prompt, on which no greedy choice is close.
        reference: Tokens and retained positions.
        ledger: What it cost.
    """

    ids: list[int]
    reference: Reference
    ledger: dict[str, Any]


@cache
def model() -> Any:
    """Build a Llama of two layers."""
    return random_llama(num_hidden_layers=2)


@cache
def answer(spec: str, length: int) -> Answer:
    """Find a prompt of a length, and transformers' answer."""
    for seed in range(100 * length, 100 * length + 50):
        ids = random_prompt(model(), length, seed)
        past = PolicyCache(model(), spec)
        run = model().generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            past_key_values=past,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(run.logits).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > LOGIT_MARGIN:
            retained = [past.retained_positions(layer) for layer in range(2)]
            reference = Reference(run.sequences[0, length:].tolist(), retained)
            return Answer(ids, reference, past.ledger().as_dict())
    raise LookupError(f"{spec}: no prompt of {length} tokens without near-ties")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The model on disk."""
    return save_model(model(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(path):
    """Engines by server policy and scheduler chunk, started once."""

    @cache
    def start(server: str, chunk: int) -> LLM:
        return start_engine(path, server, max_num_batched_tokens=chunk)

    def use(server: str, chunk: int) -> LLM:
        llm = start(server, chunk)
        # Requests are checked against the latest engine.
        announce(kvpolicy.parse(server), allowed=tuple(kvpolicy.available()))
        return llm

    return use


def assert_answers(
    llm: LLM, spec: str, lengths: tuple[int, ...] = LENGTHS, *, is_servers: bool = False
) -> None:
    """A batch of prompts gives transformers' tokens, positions and figures."""
    expected = [answer(spec, length) for length in lengths]
    prompts = [entry.ids for entry in expected]
    outputs = generate(llm, prompts, NUM_TOKENS, None if is_servers else spec)
    ledgers = kvpolicy_vllm.ledger(llm)["requests"]
    for output, entry in zip(outputs, expected, strict=True):
        assert_equals_reference(llm, output, entry.reference)
        assert_same_figures(ledgers[output.request_id], entry.ledger)


def assert_same_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two ledgers agree in all that does not depend on the host."""
    for key in ("policy", "logical_tokens", "retained", "evicted", "merged", "evictions"):
        assert found[key] == expected[key], key


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("server", "spec"), CASES)
def test_batches_in_any_chunks_equal_transformers(engines, server, spec, chunk):
    """Neighbours of other lengths and the scheduler's chunks change nothing."""
    assert_answers(engines(server, chunk), spec)


@pytest.mark.parametrize(("server", "spec"), CASES)
def test_a_request_alone_equals_transformers(engines, server, spec):
    """A lone request gives the same as in a batch."""
    assert_answers(engines(server, 2048), spec, LENGTHS[-1:])


@pytest.mark.parametrize("server", SERVERS)
def test_policies_mix_in_one_batch(engines, server):
    """Rows with slots, with numbers and without a memory do not disturb each other."""
    specs = SERVERS[server]
    llm = engines(server, 128)
    expected = [answer(spec, LENGTHS[i % len(LENGTHS)]) for i, spec in enumerate(specs)]
    outputs = generate(llm, [entry.ids for entry in expected], NUM_TOKENS, specs)
    for output, entry in zip(outputs, expected, strict=True):
        assert_equals_reference(llm, output, entry.reference)


@pytest.mark.parametrize("server", SERVERS)
def test_freed_blocks_leave_nothing_to_the_next_request(engines, server):
    """After an abort, and with prefix caching on, a memory starts empty on used blocks."""
    llm = engines(server, 128)
    assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    core = llm.llm_engine
    sampling = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True, detokenize=False)
    for index in range(8):
        prompt = {"prompt_token_ids": random_prompt(model(), 150, seed=index)}
        core.add_request(f"aborted-{server}-{index}", prompt, sampling)
    for _ in range(30):
        core.step()
    core.abort_request([f"aborted-{server}-{index}" for index in range(8)])
    for spec in SERVERS[server]:
        assert_answers(llm, spec, LENGTHS[:3])
        assert_answers(llm, spec, LENGTHS[:3])  # finds nothing of the first in the prefix cache


@pytest.mark.parametrize(("server", "num_blocks"), [*zip(SERVERS, (9, 12), strict=True)])
def test_preemption_and_recompute_change_nothing(path, server, num_blocks, monkeypatch):
    """Requests that lose their blocks and their memory start again and end the same."""
    llm = start_engine(
        path,
        server,
        num_gpu_blocks_override=num_blocks,
        max_model_len=160,
        max_num_batched_tokens=64,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    for spec in SERVERS[server]:
        preempted.clear()
        assert_answers(llm, spec)
        assert preempted, f"the pool was large enough for everyone under {spec}"


@pytest.mark.parametrize(
    ("server", "reserved"),
    [
        ("compressive:budget=96,memory=40", 40),
        ("centroid:budget=64", 16),
        ("fam:block=16,segments=3,slots=24", 24),
        ("infini:segment=48,gate=calibrated", 2 * BLOCK_SIZE),
        ("bswa:block=32,segments=0", 0),
    ],
)
def test_blocks_follow_the_law_at_any_length(path, server, reserved):
    """A request of 100, 2,000 or 10,000 tokens holds the same blocks, its memory among them."""
    llm = start_engine(path, server, max_model_len=10_240, max_num_batched_tokens=2048)
    law, found = kvpolicy.parse(server).occupancy, []
    assert law.capacity is not None
    for length in (100, 2_000, 10_000):
        [output] = generate(llm, [random_prompt(model(), length, seed=1)], 2)
        entry, tokens = kvpolicy_vllm.ledger(llm)["requests"][output.request_id], length + 1
        assert entry["evicted"] == law.evicted(tokens)
        assert entry["slots_held"] == law.held(tokens) + law.state_slots
        assert entry["evictions"] == law.evictions(tokens)
        found.append((entry["blocks_held"], entry["bytes_held"]))
    blocks = -(-(reserved + law.capacity - law.state_slots) // BLOCK_SIZE)
    page = 2 * BLOCK_SIZE * (2 * 64 * 4 + 8)
    assert found == [(blocks, 2 * blocks * page)] * 3


@pytest.mark.parametrize(
    ("server", "spec", "message"),
    [
        (0, "centroid:budget=96,slots=41", "keeps 41 memory slots beside its tokens, .* allots 40"),
        (0, "compressive:budget=140", "149 slots"),
        (0, "infini:segment=24,gate=0.5", "memory of numbers, for which .* allots no blocks"),
        (0, "infini:segment=24,gate=/g.safetensors", "must not name a file, got '/g.safetensors'"),
        (0, "compressive:budget=36,fn=conv,weights=w.safetensors", "must not name a file"),
        (0, "fam:block=8,segments=2,level=model", "through the layer's own weights"),
        (1, "centroid:budget=36", "keeps 9 memory slots"),
        (1, "infini:segment=49,gate=0.5", "49 slots"),
    ],
)
def test_what_a_server_has_no_room_for_is_refused(engines, server, spec, message):
    """A request whose memory does not fit fails alone, with the reason."""
    llm = engines([*SERVERS][server], 2048)
    prompt = random_prompt(model(), 40, seed=4)
    with pytest.raises(VLLMValidationError, match=message):
        generate(llm, [prompt], 2, spec)
    assert len(generate(llm, [prompt], 2)[0].outputs[0].token_ids) == 2


class Wide(MemoryPolicy):
    """A stranger's policy, as many numbers as it is asked for."""

    name = "wide_numbers"

    width: int = 1

    def memory_floats(self, head_dim, group):
        """So many per dimension."""
        return self.width * head_dim

    def new_memory(self, shape, setting):
        """Not asked here."""
        raise AssertionError

    def absorb(self, memory, passage):
        """Forget."""
        return memory

    def attend(self, memory, question):
        """Not asked here."""
        raise AssertionError


def test_more_numbers_than_the_server_allots_are_refused_in_the_worker():
    """What only the model tells is checked where it is known: no block of a neighbour is taken."""
    engine = Engine(Wide(budget=64), page=PageShape(BLOCK_SIZE, 64, 4, group=2))
    for width, expected in ((1, True), (500, False)):
        policy = Wide(budget=64, width=width)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvpolicy_vllm.engine.request_policy", lambda *_, found=policy: found)
            assert (engine.requested_policy(SamplingParams()) == policy) is expected


def test_gates_from_a_file_equal_transformers(path, tmp_path):
    """A server's own policy may name a file, which is read where the layers are."""
    save_file({"beta": torch.randn(2, 4)}, tmp_path / "gates.safetensors")
    spec = f"infini:segment=24,gate={tmp_path / 'gates.safetensors'}"
    llm = start_engine(path, spec, max_num_batched_tokens=64)
    assert_answers(llm, spec, is_servers=True)


def test_a_file_that_does_not_fit_the_model_stops_the_start(path, tmp_path):
    """Kernels of another rate are refused before any request could meet them."""
    kernels = {name: torch.zeros(2, 2, 4, 64, 64) for name in ("keys", "values")}
    save_file(kernels, tmp_path / "kernels.safetensors")
    file = tmp_path / "kernels.safetensors"
    with pytest.raises(ValueError, match="fit them to this model and rate"):
        start_engine(path, f"compressive:budget=36,fn=conv,rate=3,weights={file}")


def test_scaled_rotary_embeddings_are_refused(tmp_path):
    """Memories turn keys back, which needs to know how the model turned them."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    save_model(random_llama(num_hidden_layers=1, rope_parameters=rope), tmp_path)
    with pytest.raises(ValueError, match="its memory needs plain rotary embeddings"):
        start_engine(tmp_path, "centroid:budget=36")


@pytest.mark.parametrize("spec", ["compressive:budget=36,memory=12", "infini:segment=24,gate=0.3"])
def test_bfloat16_stays_within_its_rounding(path, spec):
    """Tokens decoded in bfloat16 pages have float32's log-probabilities."""
    narrow = start_engine(path, spec, dtype="bfloat16", max_num_batched_tokens=64)
    prompts = [random_prompt(model(), length, seed=length) for length in (40, 90, 130)]
    outputs = generate(narrow, prompts, 12, logprobs=0)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    found = [
        log_probabilities(output.outputs[0].logprobs, new)
        for output, new in zip(outputs, ids, strict=True)
    ]
    wide = start_engine(path, spec, max_num_batched_tokens=64)
    texts = [prompt + new for prompt, new in zip(prompts, ids, strict=True)]
    outputs = generate(wide, texts, 1, prompt_logprobs=0)
    exact = [
        log_probabilities(output.prompt_logprobs[-12:], new)
        for output, new in zip(outputs, ids, strict=True)
    ]
    assert (torch.tensor(found) - torch.tensor(exact)).abs().mean() < 0.1


def test_numbers_left_in_blocks_are_no_values_of_the_next_request(path):
    """In half precision, requests on blocks that held a memory answer as on fresh ones."""
    server = "infini:segment=40,gate=0.3"
    settings = {"dtype": "float16", "num_gpu_blocks_override": 14, "max_model_len": 160}
    llm = start_engine(path, server, **settings)
    prompts = [random_prompt(model(), length, seed=length) for length in (30, 50, 90)]
    rounds: list[list[tuple[int, ...]]] = []
    for spec in (None, "window:budget=30", None):
        outputs = [
            generate(llm, [prompt], 12, spec, logprobs=0)[0].outputs[0] for prompt in prompts
        ]
        rounds.append([tuple(output.token_ids) for output in outputs])
        for output in outputs:
            found = log_probabilities(output.logprobs, list(output.token_ids))
            assert torch.tensor(found).isfinite().all(), spec
    assert rounds[0] == rounds[2]


def log_probabilities(entries, tokens: list[int]) -> list[float]:
    """What an output says of tokens."""
    return [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]


@pytest.mark.slow
def test_a_process_of_its_own_keeps_memories_too(path, monkeypatch):
    """With the engine in another process, tokens, positions and figures are the same."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = start_engine(path, "compressive:budget=96,memory=40,interval=24")
    for spec in ("centroid:budget=36,slots=8,interval=4", "fam:block=8,segments=2,slots=8"):
        assert_answers(llm, spec)
    llm.llm_engine.engine_core.shutdown()
