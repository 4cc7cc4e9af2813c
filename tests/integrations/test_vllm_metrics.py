"""What a server's operator sees: figures on vLLM's `/metrics`, and a log line per request."""

import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import generate, start_engine
from fixtures.models import random_prompt
from kvpolicy_vllm.book import Finished, RequestLedger
from kvpolicy_vllm.metrics import OURS, SHARED, Meter

pytestmark = pytest.mark.vllm

SUMS = {
    "kvpolicy_logical_tokens_total": "logical_tokens",
    "kvpolicy_evicted_tokens_total": "evicted",
    "kvpolicy_merged_tokens_total": "merged",
    "kvpolicy_evictions_total": "evictions",
    "kvpolicy_policy_seconds_total": "policy_seconds",
    "kvpolicy_bytes_saved_total": "bytes_saved",
}
"""Counters that are sums of ledger entries."""


@pytest.fixture(autouse=True)
def looks_every_step(monkeypatch):
    """Show running requests as they stand after every step, not once a second."""
    monkeypatch.setattr("kvpolicy_vllm.metrics._SECONDS", 0.0)


def figures(llm, name) -> dict[tuple[str, str], float]:
    """An engine's figures as a scrape of this process sees them: {(figure, policy): value}."""
    served = llm.llm_engine.vllm_config.model_config.served_model_name
    assert served == name
    text = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()
    return {
        (sample.name, sample.labels["policy"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("kvpolicy_") and sample.labels["model_name"] == name
    }


def flush(llm) -> str:
    """Run a request under full; its step tells the worker that the earlier ones ended."""
    [output] = generate(llm, [[1, 2, 3]], 1)
    return output.request_id


def test_counters_are_sums_of_ledgers_by_policy_name(path, model):
    """Each counter equals the finished requests' ledgers, however many specs they bring."""
    llm = start_engine(path, "full", max_num_seqs=16, served_model_name="sums")
    specs = [f"window:budget={budget}" for budget in range(20, 30)]
    specs += ["h2o:budget=40", "tova:budget=48,interval=1"]
    generate(llm, [random_prompt(model, 60 + i, seed=i) for i in range(len(specs))], 20, specs)
    open_request = flush(llm)
    seen = figures(llm, "sums")
    assert {policy for _, policy in seen} == {"full", "window", "h2o", "tova"}
    entries = kvpolicy_vllm.ledger(llm)["requests"]
    del entries[open_request]  # its end is not known in the worker yet
    for policy in ("window", "h2o", "tova"):
        mine = [e for e in entries.values() if e["policy"].startswith(policy)]
        assert seen["kvpolicy_requests_finished_total", policy] == len(mine) > 0
        for figure, key in SUMS.items():
            # Small requests hold more than under full, by the policy's state.
            total = sum(max(0, entry[key]) for entry in mine)
            assert seen[figure, policy] == pytest.approx(total, rel=1e-12)
        assert seen["kvpolicy_evicted_tokens_total", policy] > 0
        assert seen["kvpolicy_ledger_errors_total", policy] == 0
        assert seen["kvpolicy_requests_running", policy] == 0


def test_counters_never_fall_and_gauges_stay_in_the_pool(path, model):
    """Over preemptions and aborts: counters only rise, gauges show what the law and pool hold."""
    llm = start_engine(
        path,
        "h2o:budget=96",
        num_gpu_blocks_override=12,
        max_model_len=256,
        max_num_batched_tokens=64,
        served_model_name="churn",
    )
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    page = scheduler.kv_cache_manager.coordinator.single_type_managers[0].kv_cache_spec
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=100, temperature=0.0, detokenize=False, ignore_eos=True)
    for index in range(6):
        prompt = {"prompt_token_ids": random_prompt(model, 50 + 7 * index, seed=index)}
        engine.add_request(f"churn-{index}", prompt, params)
    before, peak, steps, finished = figures(llm, "churn"), 0.0, 0, []
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step() if output.finished]
        steps += 1
        if steps == 40:
            engine.abort_request(["churn-1"])
        now = figures(llm, "churn")
        for (figure, policy), value in before.items():
            assert not figure.endswith("_total") or now[figure, policy] >= value
        blocks = now["kvpolicy_blocks_held", "h2o"]
        peak = max(peak, blocks)
        assert blocks <= 11  # vLLM keeps one to itself
        assert now["kvpolicy_bytes_held", "h2o"] == blocks * page.page_size_bytes * 2
        assert now["kvpolicy_retained_tokens", "h2o"] <= blocks * page.block_size
        before = now
    assert preempted
    assert peak >= 9
    flush(llm)
    last = figures(llm, "churn")
    # An abort can fall into a preemption, when there is nothing to account for.
    ledgers = kvpolicy_vllm.ledger(llm)["requests"]
    assert len(finished) == 5
    assert last["kvpolicy_requests_finished_total", "h2o"] == len(ledgers) - 1
    assert {*finished} <= {*ledgers}
    assert last["kvpolicy_ledger_errors_total", "h2o"] == 0
    for gauge in ("requests_running", "retained_tokens", "blocks_held", "bytes_held"):
        assert last[f"kvpolicy_{gauge}", "h2o"] == 0


def test_a_ledger_that_disagrees_with_the_law_is_counted(path, model, monkeypatch, caplog):
    """An operator's alert: a policy that did not run as configured."""
    llm = start_engine(path, "window:budget=48", served_model_name="broken")
    monkeypatch.setattr("kvpolicy_vllm.backend.decide", lambda *_: None)
    generate(llm, [random_prompt(model, 40, seed=1)], 60)
    flush(llm)
    assert figures(llm, "broken")["kvpolicy_ledger_errors_total", "window"] == 1


def test_a_logged_request_has_the_figures_of_its_ledger(path, model, caplog):
    """One line per finished request in vLLM's log, with the ledger's figures."""
    llm = start_engine(path, "h2o:budget=64", log=True, served_model_name="logged")
    caplog.set_level(logging.INFO, "vllm.kvpolicy")
    outputs = generate(llm, [random_prompt(model, n, seed=n) for n in (30, 90)], 20)
    flush(llm)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("kvpolicy: ")]
    assert len(lines) == 2
    ledgers = kvpolicy_vllm.ledger(llm)["requests"]
    for line in lines:
        fields = dict(field.split("=", 1) for field in line.removeprefix("kvpolicy: ").split(" "))
        entry = ledgers[fields["request"]]
        assert fields["policy"] == entry["policy"]
        assert int(fields["tokens"]) == entry["logical_tokens"]
        assert int(fields["blocks"]) == entry["blocks_held"]
        assert float(fields["policy_ms"]) == pytest.approx(1e3 * entry["policy_seconds"], abs=1e-3)
        for key in ("retained", "evicted", "merged", "evictions", "bytes_held", "bytes_saved"):
            assert float(fields[key]) == entry[key]
    assert {line.split("=")[1].split(" ")[0] for line in lines} == {o.request_id for o in outputs}


def test_without_the_wish_nothing_is_logged(path, model, caplog):
    """The line is opt-in."""
    llm = start_engine(path, "h2o:budget=64", served_model_name="silent")
    caplog.set_level(logging.INFO, "vllm.kvpolicy")
    generate(llm, [random_prompt(model, 30, seed=3)], 2)
    flush(llm)
    assert not [r for r in caplog.records if "request=" in r.getMessage()]


def test_a_wish_to_log_that_is_no_truth_value_is_refused(path):
    """A setting that could be read either way does not start an engine."""
    with pytest.raises(ValueError, match="must be true or false, got 'yes'"):
        start_engine(
            path,
            additional_config={"kv_policy_log": "yes", "kv_policy": "full"},
            worker_cls="kvpolicy_vllm.worker.PolicyWorker",
        )


def scrape(directory: Path) -> dict[str, float]:
    """What a front end shows of a directory, by figure."""
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return {s.name: s.value for family in registry.collect() for s in family.samples}


def test_ranks_of_one_engine_are_not_counted_twice(tmp_path):
    """Tokens are counted by the first worker alone, bytes by each; a closed worker runs nothing."""
    labels = {"model_name": "m", "engine": "0"}
    meters = [
        Meter(tmp_path, f"kvpolicy-1-abc-{rank}", labels, is_first=rank == 0) for rank in (0, 1)
    ]
    policy = kvpolicy.parse("window:budget=8")
    ledger = RequestLedger(
        policy=str(policy),
        logical_tokens=20,
        retained=8,
        evicted=12,
        slots_held=8,
        blocks_held=1,
        bytes_held=100,
        bytes_saved=50,
        evictions=12,
        policy_seconds=0.5,
        allotted_by=str(policy),
        fault="token 9, layer 0: it failed (1 layer under a window)",
    )
    from kvpolicy_vllm.metrics import Running

    for meter in meters:
        meter.begin(policy)
        meter.count(Finished("a", policy, ledger, True))
        meter.show([Running(policy, 8, 1, 100)])
    seen = scrape(tmp_path)
    assert seen["kvpolicy_requests_finished_total"] == 1
    assert seen["kvpolicy_contained_faults_total"] == 1
    assert seen["kvpolicy_evicted_tokens_total"] == 12
    assert seen["kvpolicy_policy_seconds_total"] == 0.5
    assert seen["kvpolicy_bytes_saved_total"] == 100
    assert seen["kvpolicy_blocks_held"] == 1
    assert seen["kvpolicy_bytes_held"] == 200
    for meter in meters:
        meter.close()
    seen = scrape(tmp_path)
    assert "kvpolicy_blocks_held" not in seen
    assert seen["kvpolicy_evicted_tokens_total"] == 12


def test_vllms_own_directory_takes_precedence(tmp_path, monkeypatch):
    """With several front ends, figures go where all of them look; without any, nowhere."""
    config = SimpleNamespace(
        instance_id="abc",
        parallel_config=SimpleNamespace(rank=0, data_parallel_index=1),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    ours, shared = tmp_path / "ours", tmp_path / "shared"
    for directory in (ours, shared):
        directory.mkdir()
    monkeypatch.setenv(OURS, str(ours))
    monkeypatch.setenv(SHARED, str(shared))
    with closing(Meter.of(config)) as meter:
        meter.begin(kvpolicy.parse("full"))
        assert scrape(shared)["kvpolicy_requests_running"] == 0
        assert not list(ours.iterdir())
    monkeypatch.delenv(SHARED)
    with closing(Meter.of(config)) as meter:
        meter.begin(kvpolicy.parse("full"))
        assert scrape(ours)["kvpolicy_requests_running"] == 0
    monkeypatch.setenv(OURS, str(tmp_path / "gone"))
    assert Meter.of(config) is None
    monkeypatch.delenv(OURS)
    assert Meter.of(config) is None


def test_the_directory_is_private_and_goes_with_its_front_end():
    """Only its owner may write there, a forked child leaves it alone, and nothing stays behind."""
    script = (
        "import os, stat\n"
        "from kvpolicy import parse\n"
        "from kvpolicy_vllm.frontend import announce\n"
        "announce(parse('window:budget=8'))\n"
        "announce(parse('h2o:budget=8'))\n"
        f"directory = os.environ['{OURS}']\n"
        "assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    raise SystemExit\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert os.path.isdir(directory)\n"
        "print(directory)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in (OURS, SHARED)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()
