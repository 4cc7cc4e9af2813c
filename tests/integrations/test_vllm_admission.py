"""Which policies requests may bring, from the setting to the ledger."""

import argparse
import asyncio
import json
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import assert_equals_reference, generate, reference, start_engine
from fixtures.models import random_prompt
from kvpolicy_vllm import frontend
from kvpolicy_vllm.admission import allowed_names
from kvpolicy_vllm.cli import add_flag
from kvpolicy_vllm.config import configured_policy
from kvpolicy_vllm.plugin import register
from kvpolicy_vllm.tap import RequestPolicies

pytestmark = pytest.mark.vllm

NUM_TOKENS = 12
SERVER = "h2o:budget=64"


@pytest.fixture(scope="module")
def engine(path):
    """An engine under h2o that lets requests bring h2o and tova."""
    return start_engine(path, SERVER, allow=("h2o", "tova"), max_num_batched_tokens=64)


@pytest.mark.parametrize(
    ("setting", "server", "expected"),
    [
        (None, SERVER, ("h2o",)),
        (None, "full", ("full",)),
        (None, "fixtures.policies.FadingMaximum:budget=64", ()),
        ("", SERVER, ()),
        ([], SERVER, ()),
        ("tova, window,tova", SERVER, ("tova", "window")),
        (["tova"], "full", ("tova",)),
    ],
)
def test_requests_may_bring_the_servers_own_policy_unless_others_are_listed(
    setting, server, expected
):
    """Without a list only the server's own name is allowed, and an empty list allows none."""
    assert allowed_names(setting, kvpolicy.parse(server)) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["nope"], "unknown policy 'nope'; known policies: bswa"),
        ("h2o,", "unknown policy ''"),
        ("*", "unknown policy '*'"),
        ("h2o:budget=3", "unknown policy"),
        ("fixtures.policies.FadingMaximum", "cannot use import paths"),
        ([1], "list of policies' names"),
        (True, "list of policies' names"),
        ({"h2o": 1}, "list of policies' names"),
    ],
)
def test_a_list_with_anything_but_known_names_is_refused(setting, message):
    """A misspelt list never starts a server that then refuses its users."""
    with pytest.raises(kvpolicy.PolicyError) as refusal:
        kvpolicy_vllm.engine_args(SERVER, allow=setting)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-policy", SERVER, "--kv-policy-allow", "tova,h2o"],
        ["--kv-policy-allow", "tova,h2o", "--kv-policy", SERVER],
        ["--kv-policy", SERVER, "--additional-config", '{"kv_policy_allow": "tova,h2o"}'],
        ["--additional-config", '{"kv_policy_allow": ["tova", "h2o"]}', "--kv-policy", SERVER],
    ],
)
def test_the_flag_reaches_both_processes(arguments):
    """In any order, the list lands in the configuration and where requests are validated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--additional-config", type=json.loads, default={})
    add_flag(parser)
    parsed = parser.parse_args(arguments)
    assert parsed.additional_config == {"kv_policy": SERVER, "kv_policy_allow": ["tova", "h2o"]}
    frontend.hear(SimpleNamespace(additional_config=parsed.additional_config))
    assert frontend.announced().allowed == ("tova", "h2o")
    assert str(frontend.announced().policy) == SERVER


def test_a_wrong_flag_is_bad_usage(capsys):
    """A list that cannot be is refused by the parser, with the reason."""
    parser = argparse.ArgumentParser()
    add_flag(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-policy", SERVER, "--kv-policy-allow", "h20"])
    assert "unknown policy 'h20'" in capsys.readouterr().err


def test_a_list_needs_a_policy():
    """A list on stock vLLM would promise what nobody keeps."""
    config = SimpleNamespace(additional_config={"kv_policy_allow": ["h2o"]})
    with pytest.raises(kvpolicy.PolicyError, match="add kv_policy"):
        configured_policy(config)


def test_a_list_that_comes_without_engine_args_is_checked(path):
    """An unknown name stops the engine when it is configured, before a process starts."""
    config = {"kv_policy": SERVER, "kv_policy_allow": ["nope"]}
    arguments = EngineArgs(model=str(path), additional_config=config)
    with pytest.raises(kvpolicy.PolicyError, match="unknown policy 'nope'"):
        arguments.create_engine_config()


def test_whoever_configures_an_engine_hears_of_its_policy(path):
    """A front end needs nothing but the configuration, which a stock one leaves alone."""
    config = {"kv_policy": SERVER, "kv_policy_allow": ["window"]}
    EngineArgs(model=str(path), additional_config=config).create_engine_config()
    expected = frontend.Server(kvpolicy.parse(SERVER), ("window",), is_recorded=False)
    assert frontend.announced() == expected
    EngineArgs(model=str(path)).create_engine_config()
    assert frontend.announced() == expected


def test_allowed_policies_mix_in_one_batch(engine, model):
    """Rows follow their own policies over blocks that the server's allots, as ledgers say."""
    specs = (None, "tova:budget=32", "h2o:budget=24,interval=1", "tova:budget=48,scope=head")
    prompts = [random_prompt(model, 150 + 9 * i, seed=i) for i in range(len(specs))]
    outputs = generate(engine, prompts, NUM_TOKENS, specs)
    requests = kvpolicy_vllm.ledger(engine)["requests"]
    for prompt, spec, output in zip(prompts, specs, outputs, strict=True):
        expected = reference(model, spec or SERVER, prompt, NUM_TOKENS)
        assert_equals_reference(engine, output, expected)
        entry = requests[output.request_id]
        assert kvpolicy.parse(entry["policy"]) == kvpolicy.parse(spec or SERVER)
        assert entry["allotted_by"] == SERVER
        assert entry["blocks_held"] == 3  # of 32 slots: 64 + 4, whatever the request brings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("window:budget=32", "takes h2o, tova"),
        ("full", "takes h2o, tova"),
        ("nope:budget=32", "takes h2o, tova"),
        ("tova:budget=32,tova", "tova"),
        ("tova:budget=1000", "allots 68"),
        ("os.path.Class:budget=8", "import paths"),
        (["tova"], "spec string"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason(engine, model, spec, message):
    """A name off the list, a bad spec or an import path fails alone, and says why."""
    frontend.announce(kvpolicy.parse(SERVER), allowed=("h2o", "tova"))
    with pytest.raises(VLLMValidationError, match=message):
        generate(engine, [random_prompt(model, 20, seed=1)], 2, [spec])


def test_a_request_that_got_past_the_front_runs_under_the_servers_policy(
    engine, model, monkeypatch
):
    """The worker checks again, so that no front end can bring what the server does not allow."""
    monkeypatch.setattr(RequestPolicies, "validate_params", classmethod(lambda *_: None))
    prompts = [random_prompt(model, 120, seed=seed) for seed in (1, 2)]
    specs = ("window:budget=32", "fixtures.policies.FadingMaximum:budget=32")
    outputs = generate(engine, prompts, NUM_TOKENS, specs)
    requests = kvpolicy_vllm.ledger(engine)["requests"]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equals_reference(engine, output, reference(model, SERVER, prompt, NUM_TOKENS))
        assert requests[output.request_id]["policy"] == SERVER


def test_input_sessions_are_refused():
    """Whoever sends a request in pieces to an engine under a policy is told what to do instead."""
    register()
    add, given = AsyncLLM._add_streaming_input_request, SamplingParams(n=2)
    front = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"kv_policy": SERVER}))
    with pytest.raises(kvpolicy.UnsupportedError, match="send the whole text as one prompt"):
        asyncio.run(add(front, "name", None, given))
    front.vllm_config.additional_config = {}
    front._validate_streaming_input_sampling_params = (
        AsyncLLM._validate_streaming_input_sampling_params
    )
    with pytest.raises(VLLMValidationError, match="n > 1"):  # by vLLM itself
        asyncio.run(add(front, "name", None, given))
