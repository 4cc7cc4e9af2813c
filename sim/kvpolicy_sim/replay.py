"""Replay: what policies would have kept of a trace, and what attention that would have cost."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvpolicy import CachePolicy, parse
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header, Trace
from kvpolicy_sim.details import measure_details
from kvpolicy_sim.inputs import LayerInputs
from kvpolicy_sim.lanes import Level
from kvpolicy_sim.layerwise import walk_layer
from kvpolicy_sim.report import Report
from kvpolicy_sim.result import LayerResult
from kvpolicy_sim.rules import is_compiled
from kvpolicy_sim.support import (
    choose_layers,
    choose_sequences,
    needs_weights,
    require_oracle,
    require_prompts,
    require_supported,
)
from kvpolicy_sim.weights import Weights, load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Options:
    """What a replay does beside following the policies.

    Attributes:
        level: What policies observe.
        outputs: Whether attention outputs are compared.
        details: Whether recall and lost mass are measured.
        oracle: Whether the offline optimum is computed.
    """

    level: Level = "layer-local"
    outputs: bool = True
    details: bool = True
    oracle: bool = False


def replay(
    trace: Trace | str | Path,
    policies: Sequence[str | CachePolicy] | str | CachePolicy,
    *,
    level: Level = "layer-local",
    layers: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    outputs: bool = True,
    details: bool = True,
    oracle: bool = False,
    model: str | Path | Weights | None = None,
    threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Report:
    """Replay a trace under policies, in one pass over the trace.

    Queries, keys and values are those of the traced run in every layer, so layers do not feed
    back into each other; within a layer every decision is exact, token by token.

    Args:
        trace: A trace or its path.
        policies: Policies or their specs, or one; the report has them in this order.
        level: ``layer-local``: policies observe attention renormalised over what they retained,
            as in a host. ``open-loop``: they observe full attention's weights.
        layers: Layers of the model, out of those captured; default all.
        sequences: Sequences of the trace; default all.
        outputs: Whether to compare attention outputs, which about doubles the work.
        details: Whether to measure recall and lost mass, on sampled steps.
        oracle: Whether to bound each policy's regret against the offline optimum.
        model: Folder of the traced model, or its weights; for policies that need them, such as
            fam:level=model.
        threads: Layers at a time; default one per CPU.
        advance: Told the tokens done, counted per policy, layer and KV head.

    Raises:
        PolicyError: A spec, layer or sequence is wrong.
        UnsupportedError: A policy cannot be replayed exactly from this trace, or the model is not
            the traced one.
        TraceError: The trace is damaged.
    """
    given = [policies] if isinstance(policies, str | CachePolicy) else policies
    parsed = tuple(dict.fromkeys(parse(policy) for policy in given))
    options = Options(level, outputs, details, oracle)
    if isinstance(trace, Trace):
        return _replay(trace, parsed, layers, sequences, options, model, threads, advance)
    with Trace.open(trace) as opened:
        return _replay(opened, parsed, layers, sequences, options, model, threads, advance)


def _replay(
    trace: Trace,
    policies: Sequence[CachePolicy],
    layers: Sequence[int] | None,
    sequences: Sequence[int] | None,
    options: Options,
    model: str | Path | Weights | None,
    threads: int | None,
    advance: Callable[[int], object],
) -> Report:
    """Replay an open trace, layer by layer of every sequence, some of them at a time."""
    require_supported(trace.header, policies, options.level, has_weights=model is not None)
    if options.oracle:
        require_oracle(trace.header)
    chosen = choose_sequences(trace, sequences)
    require_prompts(trace, chosen, policies)
    report = Report.blank(
        trace.header, options.level, choose_layers(trace.header, layers), chosen, policies
    )
    if any(is_compiled(member) for policy in policies for member in policy.members):
        from kvpolicy_sim import kernels

        kernels.prepare()
    weights = None
    if model is not None and any(map(needs_weights, policies)):
        weights = model if isinstance(model, Weights) else load_weights(model, trace.header)
    worker = _Worker(trace, policies, options, advance, weights)
    with _one_torch_thread(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        futures = [
            pool.submit(worker.run, sequence.index, layer)
            for sequence in chosen
            for layer in report.layers
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            worker.is_stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for future in futures:  # not as they came: means over layers depend on their order
        report.add(future.result())
    return report


class _Stopped(Exception):  # noqa: N818  (not an error: another thread's failure ends the work)
    """The replay has failed elsewhere."""


class _Worker:
    """Replays single layers; threads share it.

    Attributes:
        is_stopped: Set to end the work at the next block.
    """

    def __init__(
        self,
        trace: Trace,
        policies: Sequence[CachePolicy],
        options: Options,
        advance: Callable[[int], object],
        weights: Weights | None = None,
    ) -> None:
        self.trace, self.policies, self.options = trace, policies, options
        self.is_stopped = False
        self._rotary, self._weights = rotary_of(trace.header), weights
        self._advance = advance

    def run(self, sequence: int, layer: int) -> LayerResult:
        """Replay one layer of one sequence."""
        torch.set_num_threads(1)  # of this thread
        with torch.no_grad():  # likewise of this thread; weights may be a caller's model
            return self._replay(sequence, layer)

    def _replay(self, sequence: int, layer: int) -> LayerResult:
        inputs = LayerInputs.load(self.trace, sequence, layer, outputs=self.options.outputs)
        self.trace.release()
        decoder = None if self._weights is None else self._weights.layers[layer]
        outcomes = walk_layer(
            inputs, self.policies, self.options.level, self._rotary, self._progress, decoder
        )
        marks = self.trace.sequences[sequence].marks
        details = measure_details(inputs, outcomes, marks) if self.options.details else {}
        regrets = {}
        if self.options.oracle:
            from kvpolicy_sim.regret import measure_regret

            regrets = measure_regret(inputs, outcomes)
        return LayerResult(sequence, layer, outcomes, details, regrets)

    def _progress(self, tokens: int) -> None:
        if self.is_stopped:
            raise _Stopped
        self._advance(tokens)


def rotary_of(header: Header) -> Rotary | None:
    """The rotation that a trace's header describes."""
    rope = header.rope
    return None if rope is None else Rotary(torch.tensor(rope.inverse_frequencies))


@contextmanager
def _one_torch_thread() -> "Iterator[None]":
    """Let every worker thread have one torch thread, and the caller what it had after it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
