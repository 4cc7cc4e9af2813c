"""Traces of live vLLM requests hold what transformers computes for the same tokens."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import BLOCK_SIZE, start_engine
from fixtures.models import random_prompt, save_model
from kvpolicy.trace import Header, Rope, Trace
from kvpolicy_vllm import Capture, frontend
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.book import Account
from kvpolicy_vllm.execution import LayerBatch, log_sum_exp
from kvpolicy_vllm.pages import Pages
from kvpolicy_vllm.recorder import Recorder
from kvpolicy_vllm.rows import Row

pytestmark = pytest.mark.vllm

NUM_TOKENS = 12
REFERENCE = "kvpolicy_test_reference"
KINDS = ("q", "k", "v", "lse", "out")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> Path:
    """The model on disk, with a file that stands for its tokenizer: nobody reads it here."""
    folder = save_model(model, tmp_path_factory.mktemp("llama"))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def engine(path, tmp_path_factory) -> LLM:
    """An engine that records every second request and prefills in chunks."""
    capture = Capture(tmp_path_factory.mktemp("traces") / "new", every=2)
    return start_engine(path, "full", capture=capture, max_num_batched_tokens=64)


def generate(
    llm: LLM,
    prompts: Sequence[list[int]],
    *wishes: dict[str, Any],
    num_tokens: int = NUM_TOKENS,
    is_recorded: bool = True,
) -> list[RequestOutput]:
    """Generate greedily, each prompt with its own extra arguments if there are some."""
    # Other engines of this process may have been configured since.
    frontend.announce(kvpolicy.parse("full"), allowed=("full", "window"), is_recorded=is_recorded)
    parameters = [
        SamplingParams(
            max_tokens=num_tokens,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            extra_args=wish or None,
        )
        for wish in wishes or [{}] * len(prompts)
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, parameters, use_tqdm=False)


def fed_tokens(output: RequestOutput) -> list[int]:
    """Tokens that the model saw: the last one generated was never fed back."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]


def attention_of(model: PreTrainedModel, ids: list[int]) -> dict[int, dict[str, Tensor]]:
    """What every layer's attention receives and returns in transformers, by layer and kind."""
    found: dict[int, dict[str, Tensor]] = {}

    def attend(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
        logits = query.double() @ keys.transpose(-1, -2) * scaling
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits.masked_fill_(future, -torch.inf)
        out = logits.softmax(dim=-1) @ values
        tensors = (query, key, value, logits.logsumexp(dim=-1), out)
        found[module.layer_idx] = {
            kind: x[0].float() for kind, x in zip(KINDS, tensors, strict=True)
        }
        return out.float().transpose(1, 2), None

    AttentionInterface.register(REFERENCE, attend)
    former = model.config._attn_implementation
    model.set_attn_implementation(REFERENCE)
    try:
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        model.set_attn_implementation(former)
    return found


def assert_holds(file: Path, model: PreTrainedModel, output: RequestOutput) -> None:
    """A trace is complete, sound and holds what transformers computes, cut to its length."""
    with Trace.open(file) as trace:
        [sequence] = trace.sequences
        ids = fed_tokens(output)[: sequence.tokens]
        assert sequence.prompt_len == min(len(output.prompt_token_ids), sequence.tokens)
        assert not trace.verify()
        assert trace.read("tokens", None).tolist() == ids
        expected = attention_of(model, ids)
        for layer in trace.header.layers:
            for kind, whole in expected[layer].items():
                heads = whole.unflatten(0, (2, -1))[list(trace.header.kv_heads)].flatten(0, 1)
                found = trace.read(kind, layer)
                assert found.dtype == torch.float32
                assert found.shape == heads.shape, kind
                error = (found - heads).abs().max() / heads.abs().max()
                assert error < 1e-4, f"{kind} of layer {layer}: {error:.1e}"


def named(files: list[Path]) -> dict[str, Path]:
    """Traces by request id."""
    return {file.stem: file for file in files}


def engine_of(llm: LLM):
    """What the layers of an engine in this process share."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return next(x for x in context.values() if isinstance(x, Attention)).impl.engine


def test_a_batch_with_chunked_prefill_equals_transformers(engine, model):
    """Three prompts, computed in chunks and mixed with decoding, are recorded as if alone."""
    prompts = [random_prompt(model, length, seed=length) for length in (30, 90, 150)]
    outputs = generate(engine, prompts, *[{"kv_policy_capture": True}] * 3)
    files = named(kvpolicy_vllm.captures(engine))
    for output in outputs:
        assert_holds(files[output.request_id], model, output)
    assert len({output.outputs[0].token_ids[-1] for output in outputs}) > 1


def test_the_header_describes_the_model(engine, model, path):
    """Whoever reads a trace knows the model's shape, rotation and scale, and who wrote it."""
    [output] = generate(engine, [random_prompt(model, 9, seed=1)], {"kv_policy_capture": True})
    with Trace.open(named(kvpolicy_vllm.captures(engine))[output.request_id]) as trace:
        header = trace.header
        assert output.request_id in trace.sequences[0].source
    assert (header.model, header.model_type, header.dtype) == (path.name, "llama", "float32")
    assert (header.num_layers, header.num_query_heads, header.num_kv_heads) == (2, 4, 2)
    assert (header.head_dim, header.value_dim, header.scale) == (64, 64, 64**-0.5)
    assert (header.layers, header.kv_heads, header.query_stride) == ((0, 1), (0, 1), 1)
    assert (header.rope.kind, header.rope.interleaved) == ("default", False)
    frequencies = torch.tensor(header.rope.inverse_frequencies)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert header.tokenizer == hashlib.sha256(b"{}").hexdigest()
    assert header.policy == "full"
    assert header.producer.startswith(f"kvpolicy {kvpolicy.__version__}, vllm 0.32")


def test_every_second_request_is_recorded_and_those_that_ask(engine, model):
    """Requests count in the order they arrive; a request may ask, or ask not to be recorded."""
    recorder = engine_of(engine).recorder
    prompts = [random_prompt(model, 20, seed=seed) for seed in range(8)]
    wishes: list[dict[str, Any]] = [{} for _ in prompts]
    first = recorder._num_met % 2  # the one among the next two that is sampled
    wishes[first] = {"kv_policy_capture": 0}
    wishes[3 - first] = {"kv_policy_capture": 1}  # what JSON's true becomes
    before = set(kvpolicy_vllm.captures(engine))
    outputs = generate(engine, prompts, *wishes, num_tokens=3)
    recorded = {file.stem for file in set(kvpolicy_vllm.captures(engine)) - before}
    expected = {outputs[i].request_id for i in range(8) if i % 2 == first and i != first}
    assert recorded == expected | {outputs[3 - first].request_id}


def test_requests_under_another_policy_are_not_recorded(engine, model):
    """What an evicting policy attends to is not the full cache, so it is not sampled."""
    before = kvpolicy_vllm.captures(engine)
    prompts = [random_prompt(model, 20, seed=seed) for seed in range(4)]
    generate(engine, prompts, *[{"kv_policy": "window:budget=8"}] * 4, num_tokens=3)
    assert kvpolicy_vllm.captures(engine) == before


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"kv_policy_capture": True, "kv_policy": "window:budget=8"},
            "capture with kv_policy=full",
        ),
        ({"kv_policy_capture": "perhaps"}, "must be true or false"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(engine, model, wish, message):
    """Such a request fails alone, with the reason, and the engine lives."""
    with pytest.raises(VLLMValidationError, match=message):
        generate(engine, [random_prompt(model, 20, seed=1)], wish)
    assert generate(engine, [random_prompt(model, 20, seed=1)])


def test_a_request_cannot_ask_where_nothing_is_recorded(engine, model):
    """A server without a capture refuses the wish, instead of ignoring it."""
    prompts, wish = [random_prompt(model, 20, seed=1)], {"kv_policy_capture": True}
    with pytest.raises(VLLMValidationError, match="--kv-policy-capture"):
        generate(engine, prompts, wish, is_recorded=False)


def test_running_and_aborted_requests(engine, model):
    """A running request has no file yet; an aborted one keeps the tokens it has processed."""
    frontend.announce(kvpolicy.parse("full"), is_recorded=True)
    inner = engine.llm_engine
    sampling = SamplingParams(
        max_tokens=50,
        temperature=0.0,
        detokenize=False,
        ignore_eos=True,
        extra_args={"kv_policy_capture": True},
    )
    found: list[Path] = []
    for _ in range(2):  # a client may choose its id, and choose it twice
        prompt = {"prompt_token_ids": random_prompt(model, 10, seed=2)}
        inner.add_request("../../stolen id", prompt, sampling)
        for _ in range(4):
            [output] = inner.step()
        before = kvpolicy_vllm.captures(engine)
        inner.abort_request([output.request_id])
        inner.step()
        found += [file for file in kvpolicy_vllm.captures(engine) if file not in before]
        with Trace.open(found[-1]) as trace:
            assert trace.sequences[0].tokens == len(fed_tokens(output)) == 13
    assert [file.name for file in found] == [
        "__.._stolen_id.kvtrace",
        "__.._stolen_id-2.kvtrace",
    ]
    assert {file.parent for file in found} == {Path(engine_of(engine).recorder.capture.directory)}


def test_a_recording_that_fails_does_not_stop_the_engine(engine, model, monkeypatch):
    """A full disk costs the trace, not the request; it is told once, and others are complete."""
    monkeypatch.setattr("kvpolicy_vllm.recording.log_sum_exp", no_space_for(3))
    prompts = [random_prompt(model, length, seed=length) for length in (40, 50)]
    outputs = generate(engine, prompts, *[{"kv_policy_capture": True}] * 2)
    monkeypatch.undo()
    assert all(len(output.outputs[0].token_ids) == NUM_TOKENS for output in outputs)
    with pytest.raises(kvpolicy.TraceError, match=r"was not recorded.*No space left"):
        kvpolicy_vllm.captures(engine)
    files = named(kvpolicy_vllm.captures(engine))
    assert outputs[0].request_id not in files
    assert_holds(files[outputs[1].request_id], model, outputs[1])


def no_space_for(call: int):
    """`log_sum_exp`, whose first call of a step fails as a full disk does."""
    count = 0

    def fail_once(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(28, "No space left on device")
        return log_sum_exp(*args, **kwargs)

    return fail_once


@pytest.fixture(scope="module")
def crowded(path, tmp_path_factory) -> LLM:
    """An engine with so few blocks that requests lose theirs; it records a part of them."""
    directory = tmp_path_factory.mktemp("crowded")
    return start_engine(
        path,
        "full",
        capture=Capture(directory, layers=(1,), kv_heads=(1,), max_tokens=100),
        num_gpu_blocks_override=11,
        max_model_len=160,
        max_num_batched_tokens=64,
    )


def test_preempted_requests_are_recorded_once(crowded, model):
    """A request that starts over gives one complete trace; max_tokens cuts long ones."""
    scheduler = crowded.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request.external_req_id if hasattr(request, "external_req_id") else "")
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    lengths = (9, 30, 47, 61, 75, 83, 97, 120)
    prompts = [random_prompt(model, length, seed=length) for length in lengths]
    outputs = generate(crowded, prompts, num_tokens=20)
    assert preempted, "the pool was large enough for everyone"
    files = named(kvpolicy_vllm.captures(crowded))
    assert len(files) == len(prompts)
    for output in outputs:
        assert_holds(files[output.request_id], model, output)
        with Trace.open(files[output.request_id]) as trace:
            assert trace.sequences[0].tokens == min(len(fed_tokens(output)), 100)
            assert (trace.header.layers, trace.header.kv_heads) == ((1,), (1,))


def test_plain_configuration_in_bfloat16_is_consistent(path, model, tmp_path):
    """JSON settings with the worker class record too; log-sum-exps and outputs fit the rest."""
    directory = tmp_path / "deep" / "er"
    capture = {"directory": str(directory), "token_ids": False}
    settings = {"kv_policy": "full", "kv_policy_capture": capture}
    llm = start_engine(
        path,
        additional_config=settings,
        worker_cls="kvpolicy_vllm.worker.PolicyWorker",
        dtype="bfloat16",
        max_num_batched_tokens=64,
    )
    generate(llm, [random_prompt(model, 100, seed=3)])
    [file] = kvpolicy_vllm.captures(llm)
    assert file == directory / "0.kvtrace"
    with Trace.open(file) as trace:
        assert trace.header.dtype == "bfloat16"
        assert not trace.has("tokens", None)
        for layer in (0, 1):
            q, k, v, lse, out = (trace.read(kind, layer, dtype=torch.float64) for kind in KINDS)
            logits = q @ k.repeat_interleave(2, 0).transpose(-1, -2) * trace.header.scale
            logits.masked_fill_(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
            assert (lse - logits.logsumexp(dim=-1)).abs().max() < 1e-3
            expected = logits.softmax(dim=-1) @ v.repeat_interleave(2, 0)
            assert (out - expected).abs().max() / expected.abs().max() < 2e-2


def test_an_engine_without_capture_has_no_recorder(path, model):
    """Whoever does not ask for a capture pays nothing for it and is told so."""
    llm = start_engine(path, "full")
    generate(llm, [random_prompt(model, 20, seed=1)], num_tokens=3)
    assert engine_of(llm).recorder is None
    assert engine_of(llm).recorded([], torch.empty(0)) == []
    with pytest.raises(kvpolicy.PolicyError, match="records no requests"):
        kvpolicy_vllm.captures(llm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, 2]}, "layers has 2, but the model's go from 0 to 1"),
        ({"kv_heads": [2]}, "kv_heads has 2"),
        ({"directory": "relative"}, "absolute path"),
        ({"directory": "/dev/null/traces"}, "cannot be a directory"),
        ({"evry": 3}, "has no 'evry'"),
    ],
)
def test_wrong_settings_stop_the_engine(path, tmp_path, settings, message):
    """An engine that could not record what is asked does not start."""
    config = {"directory": str(tmp_path / "traces"), **settings}
    with pytest.raises(ValueError, match=message):
        start_engine(
            path,
            additional_config={"kv_policy": "full", "kv_policy_capture": config},
            worker_cls="kvpolicy_vllm.worker.PolicyWorker",
        )
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({}, "add kv_policy=full"),
        ({"kv_policy": "h2o:budget=64"}, "capture with kv_policy=full"),
        ({"kv_policy": "full"}, "needs a worker that knows requests"),
    ],
)
def test_a_capture_is_never_inert(path, tmp_path, policy, message):
    """Configured where it could not work, it stops the engine instead of recording nothing."""
    capture = {"kv_policy_capture": {"directory": str(tmp_path)}}
    with pytest.raises(ValueError, match=message):
        start_engine(path, additional_config={**policy, **capture})


# --- settings, without an engine --------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1 or None"),
        ({"max_tokens": "many"}, "max_tokens must be"),
        ({"max_memory": None}, "max_memory must be an integer >= 1, got None"),
        ({"layers": []}, "layers must be a list of indices"),
        ({"kv_heads": (-1,)}, "kv_heads must be a list of indices"),
        ({"token_ids": 1}, "token_ids must be a bool"),
        ({"directory": ""}, "directory must be a path"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, message):
    """A wrong setting is named before anything starts."""
    with pytest.raises(kvpolicy.PolicyError, match=message):
        Capture(**{"directory": tmp_path, **settings})


@pytest.mark.parametrize(
    "text",
    [
        "traces,every=10,layers=(1,0),max_requests=none,token_ids=false",
        "every=10,layers=(0,1),directory=traces,max_requests=None,token_ids=False",
    ],
)
def test_settings_as_text(text, monkeypatch, tmp_path):
    """One string says everything; its directory is where the front end was started."""
    monkeypatch.chdir(tmp_path)
    capture = Capture.of(text)
    assert capture == Capture("traces", every=10, layers=[0, 1], max_requests=None, token_ids=False)
    assert capture.directory == str(tmp_path / "traces")
    assert Capture.of(json.loads(json.dumps(capture.as_dict()))) == capture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traces,evry=1", "has no 'evry'; its settings: directory, every"),
        ("traces,10", "expected key=value"),
        ("every=10", "needs a directory"),
        ("traces,every=1,every=2", "given twice"),
        ("traces,layers=(a)", "layers must be a list"),
    ],
)
def test_wrong_text_is_refused(text, message):
    """Each mistake is named."""
    with pytest.raises(kvpolicy.PolicyError, match=message):
        Capture.of(text)


def test_directories_that_cannot_take_traces_are_refused(tmp_path, monkeypatch):
    """Files in the way, other runs' traces and forbidden places are refused before a start."""
    (tmp_path / "file").touch()
    with pytest.raises(kvpolicy.PolicyError, match="cannot be a directory"):
        kvpolicy_vllm.engine_args("full", capture=tmp_path / "file" / "traces")
    (tmp_path / "0.kvtrace.part").touch()
    with pytest.raises(kvpolicy.PolicyError, match=r"already holds 0\.kvtrace\.part"):
        kvpolicy_vllm.engine_args("full", capture=tmp_path)
    with pytest.raises(kvpolicy.PolicyError, match="cannot write"):
        Capture("/proc/traces").make_directory()  # not even root may
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(kvpolicy.PolicyError, match="cannot write"):
        kvpolicy_vllm.engine_args("full", capture=tmp_path / "traces")


def test_engine_args_refuse_to_record_an_evicting_policy(tmp_path):
    """What such a policy attends to is not what a trace holds."""
    with pytest.raises(kvpolicy.UnsupportedError, match="replay other policies over it"):
        kvpolicy_vllm.engine_args("h2o:budget=64", capture=tmp_path)


def test_engine_args_carry_the_capture(tmp_path):
    """Settings travel as JSON beside the policy's and the user's own."""
    given = {"mine": 1, "kv_policy_capture": {"directory": str(tmp_path), "every": 3}}
    settings = kvpolicy_vllm.engine_args("full", additional_config=given)
    config = settings["additional_config"]
    assert config == {
        "mine": 1,
        "kv_policy": "full",
        "kv_policy_capture": {**config["kv_policy_capture"]},
    }
    assert Capture.of(config["kv_policy_capture"]) == Capture(tmp_path, every=3)
    json.dumps(settings)


def parsed(*arguments: str) -> argparse.Namespace:
    """What vLLM's command line makes of some arguments."""
    from kvpolicy_vllm.cli import add_flag

    parser = argparse.ArgumentParser()
    parser.add_argument("--additional-config", type=json.loads, default={})
    add_flag(parser)
    return parser.parse_args(arguments)


def test_the_flag_records_in_any_order(tmp_path):
    """Policy, capture and other settings may come in any order; without a policy it is full."""
    capture = ["--kv-policy-capture", f"{tmp_path},every=4"]
    policy, other = ["--kv-policy", "full"], ["--additional-config", '{"x": 1}']
    for arguments in (
        [*capture, *policy, *other],
        [*other, *policy, *capture],
        [*capture, *other],
    ):
        found = parsed(*arguments)
        assert found.additional_config["kv_policy"] == "full"
        assert found.additional_config["x"] == 1
        settings = Capture.of(found.additional_config["kv_policy_capture"])
        assert settings == Capture(tmp_path, every=4)
        assert found.worker_cls == "kvpolicy_vllm.worker.PolicyWorker"
        frontend.hear(found)
        assert frontend.announced().is_recorded


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-policy-capture", "traces", "--kv-policy", "window:budget=8"],
        ["--kv-policy", "window:budget=8", "--kv-policy-capture", "traces"],
        ["--kv-policy-capture", "traces,evry=3"],
    ],
)
def test_a_wrong_flag_is_bad_usage(arguments, capsys):
    """The server does not start, and one line says why."""
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert "capture" in capsys.readouterr().err


# --- recording, without an engine -------------------------------------------------------------

HEADER = Header(
    model="m",
    num_layers=1,
    num_query_heads=2,
    num_kv_heads=1,
    layers=(0,),
    kv_heads=(0,),
    head_dim=8,
    value_dim=8,
    dtype="float32",
    scale=1.0,
    rope=Rope("default", (1.0,)),
)


def new_account(policy: kvpolicy.CachePolicy) -> Account:
    """The account of a request that has seen nothing."""
    return Account("request", policy, Allotment(policy.occupancy))


def chosen(recorder: Recorder, wishes: Sequence[bool | None]) -> set[int]:
    """Which requests are recorded, met one after the other and all running."""
    for index, wish in enumerate(wishes):
        recorder.meet(f"{index}-00000000", wish)
    count = len(wishes)
    policy = kvpolicy.parse("full")
    rows = [Row(i, policy, i, 1, 0, new_account(policy)) for i in range(count)]
    batch = SimpleNamespace(
        req_ids=[f"{index}-00000000" for index in range(count)],
        num_prompt_tokens=[1] * count,
        token_ids_cpu=np.zeros((count, 4), dtype=np.int32),
        is_token_ids=np.ones((count, 4), dtype=bool),
    )
    planned = recorder.plan(rows, torch.zeros(count, 4, dtype=torch.int32), batch)
    recorder.close()
    return {int(row.recording.name) for row in planned}


@pytest.mark.parametrize(
    ("settings", "wishes", "expected"),
    [
        ({"every": 3}, [None] * 7, {0, 3, 6}),
        ({"every": None}, [None, True, None], {1}),
        ({"every": 1, "max_requests": 2}, [None] * 5, {0, 1}),
        ({"every": 2, "max_requests": 2}, [None, True, None, True], {0, 1}),
        ({"every": 1, "max_memory": 1}, [None] * 3, {0}),
        ({"every": 1}, [None, False, None], {0, 2}),
    ],
)
def test_requests_are_chosen_by_number_wish_and_limits(tmp_path, settings, wishes, expected):
    """The same requests in the same order are chosen again."""
    recorder = Recorder(Capture(tmp_path, **settings), HEADER)
    assert chosen(recorder, wishes) == expected


def test_a_request_met_again_counts_once(tmp_path):
    """A session's further inputs carry a request's id again: they start nothing new."""
    recorder = Recorder(Capture(tmp_path, every=2), HEADER)
    for _ in range(3):
        recorder.meet("0-00000000", None)
    recorder.meet("1-00000000", None)
    recorder.meet("2-00000000", None)
    assert set(recorder._open) == {"0-00000000", "2-00000000"}


def test_files_are_completed_when_an_engine_goes_away(tmp_path):
    """An engine that is dropped without a shutdown leaves readable traces."""
    recorder = Recorder(Capture(tmp_path), HEADER)
    recorder.meet("0-00000000", None)
    policy = kvpolicy.parse("full")
    row = Row(0, policy, 0, 3, 0, new_account(policy))
    batch = SimpleNamespace(
        req_ids=["0-00000000"],
        num_prompt_tokens=[2],
        is_token_ids=np.array([[True, False, True]]),
    )
    [planned] = recorder.plan([row], torch.tensor([[1]], dtype=torch.int32), batch)
    query, key = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    planned.record(0, LayerBatch(query, key, key, query), fake_pages(), 1.0)
    del recorder, planned
    with Trace.open(tmp_path / "0.kvtrace") as trace:
        [sequence] = trace.sequences
        assert (sequence.tokens, sequence.prompt_len) == (3, 2)
        assert not trace.has("tokens", None)  # a prompt of embeddings
        assert torch.equal(trace.read("q", 0), query.transpose(0, 1))


def fake_pages(dtype: torch.dtype = torch.float32, packing: str = "vec", dim: int = 8) -> Pages:
    """Random pages of one KV head, with the tail that vLLM leaves behind each."""
    stride = BLOCK_SIZE * (2 * dim * dtype.itemsize + 8)
    raw = torch.zeros(6 * stride, dtype=torch.int8)
    width = 2 * dim * dtype.itemsize
    cache = raw.as_strided((6, 1, BLOCK_SIZE, width), (stride, BLOCK_SIZE * width, width, 1))
    cache = cache.view(dtype)
    cache.copy_(torch.randn(6, 1, BLOCK_SIZE, 2 * dim))
    return Pages.of(cache, packing)


@pytest.mark.parametrize(("packing", "dtype"), [("vec", torch.float32), ("amx", torch.bfloat16)])
@pytest.mark.parametrize("limit", [1, 1 << 22])
def test_log_sum_exp_of_a_chunk_is_the_softmaxs_denominator(monkeypatch, packing, dtype, limit):
    """Read from pages in any order, for all queries at once or one at a time."""
    monkeypatch.setattr("kvpolicy_vllm.execution._MAX_LOGITS", limit)
    pages = fake_pages(dtype, packing, dim=32)
    blocks, seen, count = torch.tensor([4, 2, 5, 0]), 41, 30
    query = torch.randn(count, 3, 32).to(dtype)
    found = log_sum_exp(query, pages, blocks, [0], seen=seen, scale=0.3)
    keys = pages.read_keys(blocks[None])[0, 0]
    for i in range(count):
        logits = query[i].double() @ keys[: seen + i + 1].double().T * 0.3  # [H, S]
        assert torch.allclose(found[i].double(), logits.logsumexp(dim=-1), atol=1e-5)


@pytest.mark.slow
def test_a_separate_process_writes_and_completes_traces(path, model, monkeypatch, tmp_path):
    """With the engine in its own process: files while it runs, and complete ones at its end."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = start_engine(path, "full", capture=tmp_path, max_num_batched_tokens=64)
    outputs = generate(llm, [random_prompt(model, length, seed=length) for length in (30, 90)])
    files = named(kvpolicy_vllm.captures(llm))
    for output in outputs:
        assert_holds(files[output.request_id], model, output)
    sampling = SamplingParams(max_tokens=1000, detokenize=False, ignore_eos=True)
    llm.llm_engine.add_request("open", {"prompt_token_ids": [1, 2, 3]}, sampling)
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.engine_core.shutdown()
    with Trace.open(tmp_path / "open.kvtrace") as trace:
        assert trace.sequences[0].tokens >= 5
