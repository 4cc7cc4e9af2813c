"""Fit a memory's parameters to a trace: kernels of `compressive`, gates of `infini`.

Nothing is trained end to end: queries, keys and values are those of the traced run, and every
layer is fitted by itself.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kvpolicy import CachePolicy, PolicyError, UnsupportedError, parse
from kvpolicy.extras import require
from kvpolicy.memory.parameters import load_parameters
from kvpolicy.policies.compressive import Compressive
from kvpolicy.policies.infini import Infini
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header, Trace
from kvpolicy_sim.support import choose_layers, choose_sequences, reason_against_raw_keys

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Losses:
    """A loss with the parameters that need no fit, and with fitted ones.

    Attributes:
        before: Of kernels that average, or of closed gates.
        after: Of what was fitted.
    """

    before: float
    after: float


@dataclass(frozen=True)
class LayerFit:
    """What a fit came to in one layer; losses are squared errors relative to the target's square.

    Attributes:
        layer: Its index in the model.
        fitted: On the tokens that parameters were fitted to.
        held_out: On the last tokens of each sequence, with parameters that were not fitted to
            them.
    """

    layer: int
    fitted: Losses
    held_out: Losses


class Fitter(Protocol):
    """Fits one layer after the other; threads share it."""

    def run(self, layer: int) -> tuple[LayerFit, dict[str, Tensor]]:
        """Fit a layer; its parameters by name, of the KV heads or query heads recorded."""
        ...

    def blank(self, header: Header) -> dict[str, Tensor]:
        """Parameters of all layers and heads of the model that leave a memory as it was."""
        ...

    def place(self, header: Header) -> Sequence[int]:
        """Indices in the model of the heads that `run` gives parameters of."""
        ...


@dataclass(frozen=True)
class Fitted:
    """What was written.

    Attributes:
        policy: The policy that reads the file.
        path: The file.
        layers: One per layer, ascending.
    """

    policy: CachePolicy
    path: Path
    layers: tuple[LayerFit, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "policy": str(self.policy),
            "file": str(self.path),
            "layers": [asdict(layer) for layer in self.layers],
        }


def fit(
    trace: Trace | str | Path,
    policy: str | CachePolicy,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    steps: int = 200,
    threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Fitted:
    """Fit a policy's parameters to a trace and write them as a safetensors file.

    ``compressive:...,fn=conv`` gets kernels (`fit_kernels`), ``infini:...`` gates (`fit_gates`).
    Layers and heads that were not captured or not asked for get averages, or closed gates. The
    same trace and arguments give the same file.

    Args:
        trace: A trace or its path.
        policy: The policy; what is fitted takes the place of its `weights` or `gate`.
        out: The file.
        layers: Layers to fit, out of those captured; default all.
        sequences: Sequences of the trace; default all.
        steps: Gradient steps of kernels.
        threads: Layers at a time; default one per CPU.
        advance: Told the layers done.

    Raises:
        PolicyError: The policy has nothing to fit, or the file cannot be named in a spec or
            written.
        UnsupportedError: The trace has not what a fit needs, or safetensors is not installed.
        TraceError: The trace is damaged.
    """
    parsed, path = parse(policy), Path(out)
    fitted_policy = _with_file(parsed, path)
    if steps < 1:
        raise PolicyError(f"steps must be at least 1, got {steps}")
    if path.is_dir() or not path.parent.is_dir():
        raise PolicyError(
            f"{path}: parameters are written as a file in a folder that exists; choose another name"
        )
    require("safetensors", "writing parameters")
    if not isinstance(trace, Trace):
        with Trace.open(trace) as opened:
            return fit(
                opened,
                policy,
                out,
                layers=layers,
                sequences=sequences,
                steps=steps,
                threads=threads,
                advance=advance,
            )
    chosen = choose_layers(trace.header, layers)
    indices = [sequence.index for sequence in choose_sequences(trace, sequences)]
    fitter = _fitter(trace, parsed, indices, steps)
    with _pool(threads) as pool:
        futures = [pool.submit(_run, fitter, layer) for layer in chosen]
        for future in as_completed(futures):
            future.result()
            advance(1)
    tensors, heads = fitter.blank(trace.header), list(fitter.place(trace.header))
    found: list[LayerFit] = []
    for future in futures:
        made, parameters = future.result()
        found.append(made)
        for name, value in parameters.items():
            tensors[name][made.layer, heads] = value
    write_parameters(path, tensors, about=str(parsed))
    return Fitted(fitted_policy, path, tuple(found))


def write_parameters(path: Path, tensors: dict[str, Tensor], about: str) -> None:
    """Write a file of parameters, with what they were fitted for, at once or not at all."""
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part, metadata={"policy": about})  # several would be in any order
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    load_parameters.cache_clear()  # it may have read what stood there before


def _with_file(policy: CachePolicy, path: Path) -> CachePolicy:
    """The policy as it reads the file that is to be written."""
    match policy:
        case Compressive(fn="conv"):
            found = replace(policy, weights=str(path))
        case Infini():
            found = replace(policy, gate=str(path))
        case _:
            raise PolicyError(
                f"{policy} has nothing to fit; choose compressive:...,fn=conv or infini:..."
            )
    return found


def _fitter(trace: Trace, policy: CachePolicy, sequences: Sequence[int], steps: int) -> Fitter:
    """What fits the policy's parameters.

    Raises:
        UnsupportedError: The trace has not what it needs.
    """
    from kvpolicy_sim.fit_gates import GateFitter
    from kvpolicy_sim.fit_kernels import KernelFitter

    header = trace.header
    reason = reason_against_raw_keys(header)
    if reason:
        raise UnsupportedError(f"{policy}: a fit looks at keys before their rotation, and {reason}")
    if header.query_stride > 1:
        raise UnsupportedError(
            f"{policy}: a fit needs every query and the trace has every {header.query_stride}th; "
            "capture with query_stride=1"
        )
    assert header.rope is not None, "there is no reason against it"
    rotary = Rotary(torch.tensor(header.rope.inverse_frequencies))
    if isinstance(policy, Compressive):
        return KernelFitter(trace, policy, sequences, rotary, steps)
    assert isinstance(policy, Infini), "nothing else is fitted"
    return GateFitter(trace, policy, sequences, rotary)


def _run(fitter: Fitter, layer: int) -> tuple[LayerFit, dict[str, Tensor]]:
    torch.set_num_threads(1)  # of this thread; sums in another order would give other parameters
    return fitter.run(layer)


@contextmanager
def _pool(threads: int | None) -> "Iterator[ThreadPoolExecutor]":
    """Worker threads; the caller has as many torch threads afterwards as before."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
