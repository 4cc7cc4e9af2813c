"""Replay beside what it replaces: a vectorised loop in torch, and kvpress on a live model.

All at the width of Llama-3-8B, one thread each, taking turns so that a busy machine slows all
alike. CPU time is what counts: it hardly depends on what else the machine does.

Axes: H_kv KV heads, G query heads per KV head, T tokens, D head dimension.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import pytest
import torch

from bench.torch_replay import TorchReplay
from kvpolicy import EvictionPolicy, parse
from kvpolicy.trace import TraceWriter
from kvpolicy_sim import replay
from kvpolicy_sim.dense import attend
from kvpolicy_sim.inputs import LayerInputs
from kvpolicy_sim.layerwise import walk_layer
from kvpolicy_sim.patterns import Head
from kvpolicy_sim.synth import synth

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
KVPRESS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 32, 8, 4, 128
"""Llama-3-8B."""

BUDGET = 1024
POLICIES = ("h2o", "tova", "window")
ROUNDS = 5
LONG = 8192
"""Tokens of a sequence of the long trace."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a step of all layers."""

    cpu: float
    wall: float


class Stopwatch:
    """Time since it was made, less what is passed over."""

    def __init__(self) -> None:
        self._start = self._lap = (process_time(), perf_counter())
        self._left_out = (0.0, 0.0)

    def lap(self, *, counts: bool) -> None:
        """End a stretch, which counts or not."""
        now = process_time(), perf_counter()
        if not counts:
            past = zip(self._left_out, now, self._lap, strict=True)
            self._left_out = tuple(out + end - begin for out, end, begin in past)
        self._lap = now

    def cost(self, steps: int, layers: int) -> Cost:
        """What counts, per step of all layers."""
        past = zip((process_time(), perf_counter()), self._start, self._left_out, strict=True)
        cpu, wall = (
            1e3 * (now - start - out) * LAYERS / layers / steps for now, start, out in past
        )
        return Cost(cpu, wall)


class Ours:
    """The compiled replay, with outputs compared: layer after layer, two of them measured."""

    name, STEPS, LAYERS_TIMED = "kvpolicy", 512, 2

    def __init__(self) -> None:
        self._layers = [heavy_layer(BUDGET + self.STEPS, seed) for seed in range(self.LAYERS_TIMED)]

    def measure(self, policy: EvictionPolicy) -> Cost:
        """Take whole layers; what it takes until the cache is full does not count."""
        watch, unit = Stopwatch(), KV_HEADS if policy.scope_is_layer else 1
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens // unit
            watch.lap(counts=(done - 1) % (BUDGET + self.STEPS) >= BUDGET)

        for layer in self._layers:
            walk_layer(layer, [policy], "layer-local", None, advance)
        return watch.cost(self.STEPS, len(self._layers))


class Torch:
    """The vectorised loop over all heads of some layers at once."""

    STEPS, WARM_UP = 16, 4

    def __init__(self, layers_at_once: int) -> None:
        self.name = f"torch, {layers_at_once * KV_HEADS} heads at once"
        self._layers_at_once = layers_at_once
        # As many tokens in all: a round takes half a second for either width.
        self._steps = self.STEPS * min(4, LAYERS // layers_at_once)
        tokens = BUDGET + self.WARM_UP + ROUNDS * self._steps
        layers = [heavy_layer(tokens, seed) for seed in range(2)] * (layers_at_once // 2)
        self._replays = {name: TorchReplay(layers, policy_named(name)) for name in POLICIES}
        self._token = dict.fromkeys(POLICIES, BUDGET)
        for name in POLICIES:
            self._take(name, self.WARM_UP)

    def measure(self, policy: EvictionPolicy) -> Cost:
        """Take the next tokens; the cache is full."""
        watch = Stopwatch()
        self._take(policy.name, self._steps)
        return watch.cost(self._steps, self._layers_at_once)

    def _take(self, name: str, steps: int) -> None:
        first = self._token[name]
        self._token[name] += steps
        for token in range(first, first + steps):
            self._replays[name].step(token)


class Kvpress:
    """kvpress decoding with a live model, in the environment that it needs."""

    name, STEPS = "kvpress", 2
    PRESSES: ClassVar[dict[str, str]] = {"h2o": "observed", "tova": "tova", "window": "streaming"}

    def __init__(self) -> None:
        shape = {"layers": LAYERS, "kv-heads": KV_HEADS, "group": GROUP, "head-dim": HEAD_DIM}
        options = [f"--{key}={value}" for key, value in {**shape, "budget": BUDGET}.items()]
        self._process = subprocess.Popen(
            [KVPRESS_PYTHON, Path(__file__).with_name("kvpress_decoding.py"), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        assert self._answers.readline() == "ready\n", "kvpress did not start: see stderr"

    def measure(self, policy: EvictionPolicy) -> Cost:
        """Let it decode some tokens."""
        print(self.PRESSES[policy.name], self.STEPS, file=self._questions, flush=True)
        seconds = json.loads(self._answers.readline())
        return Cost(*(1e3 * seconds[clock] / self.STEPS for clock in ("cpu", "wall")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:
            self._questions.close()


def test_step_beside_torch_and_kvpress(capsys):
    """Prints the CPU time of a step of all layers, medians of rounds, and its ratio to ours."""
    policies = [policy_named(name) for name in POLICIES]
    with ExitStack() as stack:
        contestants = [Ours(), Torch(LAYERS), Torch(LAYERS // 8)]
        if KVPRESS_PYTHON.exists():
            contestants.append(stack.enter_context(Kvpress()))
        for policy in policies:
            contestants[0].measure(policy)
        rounds = [
            {(c.name, p.name): c.measure(p) for p in policies for c in contestants}
            for _ in range(ROUNDS)
        ]
    with capsys.disabled():
        print(
            f"\nreplay step, {LAYERS} layers x {KV_HEADS} KV heads x {GROUP} query heads of ",
            end="",
        )
        print(f"{HEAD_DIM}, {BUDGET} slots, interval 1, float32; load {os.getloadavg()[0]:.1f}")
        print("CPU ms (wall), times ours" + "".join(f"{name:>27}" for name in POLICIES))
        for contestant in contestants:
            cells = [cell(rounds, contestant.name, name) for name in POLICIES]
            print(f"{contestant.name:25}" + "".join(f"{text:>27}" for text in cells))
        print("kvpress runs ObservedAttentionPress (this step's attention only, so not H2O),")
        print("TOVAPress and StreamingLLMPress (4 sinks), and pays for a small model")
    if len(contestants) < 4:
        pytest.skip(f"kvpress was not measured: no {KVPRESS_PYTHON}; run `make bench-env`")


def cell(rounds: list[dict[tuple[str, str], Cost]], name: str, policy: str) -> str:
    """Median CPU and wall time of a step, and the median ratio of CPU times to ours."""
    costs = [costs[name, policy] for costs in rounds]
    cpu, wall = (statistics.median(getattr(c, clock) for c in costs) for clock in ("cpu", "wall"))
    ratios = [costs[name, policy].cpu / costs[Ours.name, policy].cpu for costs in rounds]
    return f"{cpu:.1f} ({wall:.1f}) {statistics.median(ratios):5.1f}x"


@pytest.mark.parametrize("name", POLICIES)
def test_torch_baseline_decides_as_the_replay(name):
    """What is compared does the same: the same evictions, the same outputs."""
    budget, tokens = 128, 512
    layers = [heavy_layer(tokens, seed) for seed in range(2)]
    policy = policy_named(name, budget)
    baseline = TorchReplay(layers, policy)
    outputs = [baseline.step(token).clone() for token in range(budget, tokens)]
    outcomes = [
        walk_layer(layer, [policy], "layer-local", None, lambda _: None)[policy] for layer in layers
    ]
    ours = np.concatenate([outcome.evicted_at for outcome in outcomes])
    theirs = baseline.evicted_at(tokens).numpy()
    assert (ours == theirs).all()
    errors = relative_errors(torch.stack(outputs), layers)  # [layers, steps]
    for outcome, error in zip(outcomes, errors, strict=True):
        assert outcome.output_error[budget:] == pytest.approx(error.numpy(), rel=1e-3, abs=1e-5)


def relative_errors(outputs: torch.Tensor, layers: list[LayerInputs]) -> torch.Tensor:
    """Error of outputs [steps, N, G, D] of the last tokens against full attention's."""
    ideal = torch.stack([x.outputs for x in layers])[:, :, :, -len(outputs) :]
    found = outputs.unflatten(1, (len(layers), -1)).permute(1, 2, 3, 0, 4)
    norm = torch.linalg.vector_norm
    return norm(found - ideal, dim=(1, 2, 4)) / norm(ideal, dim=(1, 2, 4))


@pytest.fixture(scope="module")
def long_trace() -> Iterator[Path]:
    """10.8 GB: two sequences of 32 layers, in bfloat16, with full attention's results.

    One layer is made, and written as all of them: what a replay takes does not depend on it.
    """
    with tempfile.TemporaryDirectory(prefix="kvpolicy-bench-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 13e9:
            pytest.skip(f"needs 13 GB of disk for a trace, {folder} has {free / 1e9:.1f} GB free")
        one = synth(
            Path(folder, "layer.kvtrace"),
            pattern="heavy",
            tokens=LONG,
            kv_heads=KV_HEADS,
            group=GROUP,
            head_dim=HEAD_DIM,
            dtype="bfloat16",
        )
        header = replace(one.header, num_layers=LAYERS, layers=tuple(range(LAYERS)))
        with one, TraceWriter(path := Path(folder, "long.kvtrace"), header) as writer:
            tensors = {kind: one.read(kind, 0) for kind in ("q", "k", "v", "lse", "out")}
            for _ in range(2):
                sequence = writer.begin(prompt_len=LONG)
                for layer in range(LAYERS):
                    for kind, rows in tensors.items():
                        writer.append(sequence, layer, kind, 0, rows)
                writer.end(sequence)
        yield path


@pytest.mark.parametrize("policy", [f"h2o:budget={BUDGET}", f"h2o:budget={BUDGET},interval=1"])
def test_long_sequence(policy, long_trace, capsys):
    """Prints the time of a sequence of 8,192 tokens, all layers, on two threads."""
    replay(long_trace, [policy], layers=[0], sequences=[0], threads=1)  # compiles
    wall, cpu = perf_counter(), process_time()
    replay(long_trace, [policy], sequences=[0], threads=2)
    wall, cpu = perf_counter() - wall, process_time() - cpu
    with capsys.disabled():
        print(f"\n{policy}, {LONG} tokens x {LAYERS} layers x {KV_HEADS} KV heads, 2 threads: ")
        print(f"{wall:.1f} s wall, {cpu:.1f} s CPU; load {os.getloadavg()[0]:.1f}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
def test_memory_of_a_large_trace(long_trace, capsys):
    """A trace of 10 GB replays within the estimate that is printed before it."""
    command = [sys.executable, Path(__file__).with_name("replay_memory.py"), long_trace, "2"]
    policy, size = "h2o:budget=256", long_trace.stat().st_size
    done = subprocess.run([*command, policy], stdout=subprocess.PIPE, text=True, check=True)
    expected, found = map(json.loads, done.stdout.splitlines())
    with capsys.disabled():
        print(f"\n{policy} on {size / 1e9:.1f} GB, 2 threads; load {os.getloadavg()[0]:.1f}")
        print(f"estimate: {expected['bytes'] / 1e9:.2f} GB, {expected['seconds']:.0f} s")
        print(f"found: {found['bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s, ", end="")
        print(f"{found['cpu']:.0f} s CPU; {expected['held'] / 1e9:.2f} GB held before it began")
    assert found["bytes"] <= expected["bytes"] < size / 3


def policy_named(name: str, budget: int = BUDGET) -> EvictionPolicy:
    """A policy that evicts a token at every step."""
    policy = parse(f"{name}:budget={budget},interval=1")
    assert isinstance(policy, EvictionPolicy)
    return policy


def heavy_layer(tokens: int, seed: int) -> LayerInputs:
    """A layer with planted heavy hitters, and what full attention makes of it."""
    blocks = [
        list(
            Head(
                "heavy",
                tokens=tokens,
                group=GROUP,
                head_dim=HEAD_DIM,
                seed=seed,
                layer=0,
                kv_head=head,
            ).blocks()
        )
        for head in range(KV_HEADS)
    ]
    queries = torch.stack([torch.cat([b.q for b in head], dim=1) for head in blocks])
    keys = torch.stack([torch.cat([b.k for b in head]) for head in blocks])
    values = torch.stack([torch.cat([b.v for b in head]) for head in blocks])
    queries *= HEAD_DIM**-0.5
    full = attend(queries.flatten(0, 1), keys, values, torch.arange(tokens), 1.0)
    assert full.out is not None
    return LayerInputs(
        layer=0,
        kv_heads=tuple(range(KV_HEADS)),
        tokens=tokens,
        stride=1,
        queries=queries,
        keys=keys,
        values=values,
        lse=full.lse.view(queries.shape[:3]),
        outputs=full.out.view(queries.shape),
    )
