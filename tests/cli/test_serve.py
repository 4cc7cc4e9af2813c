"""`kvpolicy serve`: its own few arguments, and a real server over HTTP."""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fixtures.servers import Server, serving
from kvpolicy import UnsupportedError, bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.cli.arguments import require_plugin
from kvpolicy.cli.serve import served_model, split_model

CONNECTIONS = 8
"""Clients of a server with two front ends, whose kernel or load decides who gets which."""

SEVERAL = {
    "front ends": ["--api-server-count", "2"],
    "replicas": ["--data-parallel-size", "2"],  # each has a front end as well
}
"""Arguments of servers of several processes."""


def test_model_is_the_first_argument() -> None:
    """A value of an option is never taken for the model."""
    assert split_model(["m", "--port", "1"]) == ("m", ["--port", "1"])
    assert split_model(["--port", "1"]) == (None, ["--port", "1"])


@pytest.mark.parametrize(
    ("model", "rest", "expected"),
    [
        ("m", [], ["m"]),
        (None, [], [bundled_model(), "--served-model-name", "bundled"]),
        (None, ["--served_model_name=x"], [bundled_model()]),
        (None, ["--model", "m"], []),
        (None, ["--config=file.yaml"], []),
    ],
)
def test_bundled_model_is_the_default(
    model: str | None, rest: list[str], expected: list[str]
) -> None:
    """Without a model the bundled one is served, under a name that requests can use."""
    assert served_model(model, rest) == expected


def test_a_misspelt_list_is_refused_before_vllm_is_imported() -> None:
    """A list of unknown policies costs a moment, not the time that vLLM takes to start."""
    script = (
        "import sys; from kvpolicy.cli import main\n"
        "code = main(['serve', 'm', '--kv-policy', 'h2o:budget=8', '--kv-policy-allow', 'h20'])\n"
        "sys.exit(100 if 'vllm' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"unknown policy 'h20'" in done.stderr


@pytest.mark.parametrize("listed", ["", "lora", "lora,other"])
def test_excluded_plugin_is_refused(listed: str) -> None:
    """A server whose plugin is kept out would ignore the policy, so it does not start."""
    with pytest.raises(UnsupportedError, match="VLLM_PLUGINS"):
        require_plugin({"VLLM_PLUGINS": listed})
    require_plugin({"VLLM_PLUGINS": "lora,kvpolicy"})
    require_plugin({})


def test_missing_policy_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """The command never starts a server without a policy."""
    assert main(["serve", "model"]) == 2
    assert "--kv-policy" in capsys.readouterr().err


def test_bad_spec_is_refused_before_vllm_is_imported() -> None:
    """A wrong spec costs a moment, not the time that vLLM takes to start."""
    script = (
        "import sys; from kvpolicy.cli import main\n"
        "code = main(['serve', 'm', '--kv-policy', 'h2o:budget=x'])\n"
        "sys.exit(100 if 'vllm' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-policy", "window:budget=8", "--additional-config", '{"x": 1}'],
        ["--additional-config", '{"x": 1}', "--kv-policy", "window:budget=8"],
    ],
)
def test_policy_survives_other_settings(arguments: list[str]) -> None:
    """A further --additional-config, before or after, never drops the policy silently."""
    from kvpolicy_vllm.cli import WORKER, add_flag

    parser = argparse.ArgumentParser()
    parser.add_argument("--additional-config", type=json.loads, default={})
    add_flag(parser)
    parsed = parser.parse_args(arguments)
    assert parsed.additional_config == {"x": 1, "kv_policy": "window:budget=8"}
    assert parsed.worker_cls == WORKER


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a setting of another plugin, which vLLM reads last."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--additional-config.of_another_plugin", "1"]
    arguments += ["--kv-policy-allow", "h2o,window", "--kv-policy-log"]
    with serving("h2o:budget=96", *arguments, log=log) as running:
        yield running


@pytest.mark.slow
@pytest.mark.vllm
def test_server_completes_under_policies_and_stops_cleanly(server: Server) -> None:
    """Completions, a request's own policy, HTTP 400 for bad ones, and exit code 0 on SIGTERM."""
    prompt = heldout_text()[:2000]
    own = server.complete(prompt)
    assert own.status_code == 200, own.text
    assert own.json()["usage"]["completion_tokens"] == 16
    window = server.complete(prompt, vllm_xargs={"kv_policy": "window:budget=64"})
    assert window.status_code == 200, window.text
    for bad, reason in {
        "window:budget=4096": "4352 slots",
        "window": "window needs budget",
        "nope": "takes h2o, window",
        "tova:budget=64": "takes h2o, window",
        "os.path.Class:budget=8": "import paths",
    }.items():
        refused = server.complete(prompt, vllm_xargs={"kv_policy": bad})
        assert refused.status_code == 400, refused.text
        assert reason in refused.json()["error"]["message"]
    # The worker hears of the end of the request before with this one's first step.
    assert server.complete(prompt).json()["choices"] == own.json()["choices"]
    log = server.log.read_text("utf-8", "replace")
    assert re.search(r"policy=window:budget=64 tokens=\d.*allotted_by=h2o:budget=96", log)
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.vllm
def test_requests_share_a_kept_prompt_over_http(tmp_path: Path) -> None:
    """A prompt that comes again is found, answers are the same, and /metrics counts the hits."""
    arguments = ["--enable-prompt-tokens-details", "--block-size", "32"]
    arguments += ["--kv-policy-allow", "h2o,tova"]
    with serving("h2o:budget=32,protect=prompt", *arguments, log=tmp_path / "log") as server:
        prompt, own = heldout_text()[:2000], "tova:budget=16,protect=prompt"
        first, again = (server.complete(prompt, max_tokens=80).json() for _ in range(2))
        other = server.complete(prompt, max_tokens=80, vllm_xargs={"kv_policy": own}).json()
        tokens = first["usage"]["prompt_tokens"]
        details = [each["usage"]["prompt_tokens_details"] for each in (first, again, other)]
        assert [(each or {}).get("cached_tokens", 0) for each in details] == [
            0,
            (tokens - 1) // 32 * 32,
            (tokens - 1) // 32 * 32,
        ]
        assert again["choices"] == first["choices"]
        refused = server.complete(prompt, vllm_xargs={"kv_policy": "h2o:budget=16"})
        assert refused.status_code == 400
        assert "add protect=prompt" in refused.json()["error"]["message"]
        metrics = server.client.get("/metrics").text
        [hits] = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
        assert float(hits) == 2 * ((tokens - 1) // 32 * 32)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("replicated", SEVERAL)
def test_requests_bring_policies_to_several_processes(replicated: str, tmp_path: Path) -> None:
    """Whichever front end or replica a request reaches, it takes what the server allows, no more.

    Answers are those of transformers, and figures name the replica that gave them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fixtures.engines import reference

    arguments = [*SEVERAL[replicated], "--kv-policy-allow", "h2o,window", "--enable-log-requests"]
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype="float32")
    prompt = AutoTokenizer.from_pretrained(bundled_model())(heldout_text()[:2000]).input_ids
    server_policy, own = "window:budget=96", "window:budget=16"
    expected = {spec: reference(model, spec, prompt, 16).tokens for spec in (server_policy, own)}
    assert expected[server_policy] != expected[own]
    with (
        serving(server_policy, *arguments, log=tmp_path / "log") as server,
        ExitStack() as connections,
    ):

        def complete(**extra: Any) -> httpx.Response:
            return other.complete(prompt, max_tokens=16, return_token_ids=True, **extra)

        # A connection stays with the process that took it, so each of these is held open.
        for _ in range(CONNECTIONS):
            client = httpx.Client(base_url=server.url, timeout=60, trust_env=False)
            other = replace(server, client=connections.enter_context(client))
            for spec, extra in {
                server_policy: {},
                own: {"vllm_xargs": {"kv_policy": own}},
            }.items():
                taken = complete(**extra)
                assert taken.status_code == 200, taken.text
                assert taken.json()["choices"][0]["token_ids"] == expected[spec]
            refused = complete(vllm_xargs={"kv_policy": "tova:budget=64"})
            assert refused.status_code == 400, refused.text
            assert "takes h2o, window" in refused.json()["error"]["message"]
        finished = wait_for_finished(server, 2 * CONNECTIONS)
        log = server.log.read_text("utf-8", "replace")
    assert {*re.findall(r"ApiServer_(\d) .*Received request", log)} == {"0", "1"}
    assert {*finished} == ({"0", "1"} if replicated == "replicas" else {"0"})


def wait_for_finished(server: Server, count: int) -> dict[str, float]:
    """Requests that finished, by replica, once so many did."""
    deadline, finished = time.monotonic() + 60, dict[str, float]()
    while sum(finished.values()) != count:
        assert time.monotonic() < deadline, f"{finished} of {count} requests finished"
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        finished = {
            sample.labels["engine"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "kvpolicy_requests_finished_total"
        }
    return finished
