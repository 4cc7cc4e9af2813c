"""What a replay will take, before it begins: memory as a bound, time as a guess."""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

from kvpolicy import CachePolicy, Occupancy
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.trace import Header
from kvpolicy.trace import Sequence as TracedSequence
from kvpolicy.trace.header import ITEM_BYTES
from kvpolicy_sim.details import SAMPLED_ROWS
from kvpolicy_sim.inputs import BLOCK
from kvpolicy_sim.rules import is_compiled

_FLOAT = 4

_BUFFERS = 4
"""Arrays of a block's size that are alive at once: logits, weights, masks and temporaries."""

_MEMORY_BUFFERS = 8
"""The same where a policy has a memory, whose logits stand before the tokens' own."""

_MEMORY_COPIES = 12
"""Copies of a memory, and of the tokens that it takes in at once, while it does so."""

ALLOWANCE = 96 << 20
"""Bytes for code that is loaded on the way, thread stacks, and what an allocator keeps."""

_PASSES = 10
"""Passes over a block's weights, in units of one exponential: its own, and the walk's."""


_READ_PASSES, _DETAIL_PASSES = 12, 20
"""The same for every number read, checked and converted, and for rows of details."""

_BLOCK_SECONDS = 2e-4
"""Python's share of a block."""

_CORE_BLOCKS = 4
"""What the core's look-ahead takes more, between two evictions and in a block, in such shares."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a replay.

    Attributes:
        bytes: Most memory that the process will hold, what it holds already included.
        seconds: Time, if the processors have nothing else to do.
    """

    bytes: int
    seconds: float


def estimate(
    header: Header,
    sequences: Sequence[TracedSequence],
    num_layers: int,
    policies: Sequence[CachePolicy],
    threads: int,
    *,
    outputs: bool = True,
    details: bool = True,
    oracle: bool = False,
) -> Estimate:
    """Estimate a replay of some layers of some sequences; the time is without the oracle's."""
    members = [member for policy in policies for member in policy.members]
    if any(map(is_compiled, members)):
        from kvpolicy_sim import kernels

        kernels.prepare()
    longest = max(sequences, key=lambda sequence: sequence.tokens)
    at_once = min(threads, num_layers * len(sequences))
    working = _layer_bytes(header, longest.tokens, outputs)
    working += max(_block_bytes(header, sequence, members) for sequence in sequences)
    working += max(_memory_bytes(header, member) for member in members)
    working += max(_oracle_bytes(x, members) for x in sequences) if oracle else 0
    results = sum(
        _result_bytes(header, sequence.tokens) * num_layers * len(policies)
        for sequence in sequences
    )
    # One policy's masses are copied to be sorted.
    results += results // len(policies)
    work = sum(walk_seconds(header, s, p, outputs=outputs) for s in sequences for p in policies)
    work += sum(_shared_work(header, s.tokens, len(policies), details) for s in sequences)
    seconds = work * num_layers / at_once
    return Estimate(resident_bytes() + ALLOWANCE + at_once * working + results, seconds)


def _layer_bytes(header: Header, tokens: int, outputs: bool) -> int:
    """One layer in float32, the pages of the file that it comes from, and one tensor in transit."""
    rows = -(-tokens // header.query_stride)
    kv_heads, heads = len(header.kv_heads), len(header.kv_heads) * header.group
    query_like = heads * rows * header.head_dim
    out = heads * rows * header.value_dim if outputs else 0
    numbers = query_like + out + kv_heads * tokens * (header.head_dim + header.value_dim)
    numbers += heads * rows
    return numbers * (_FLOAT + ITEM_BYTES[header.dtype]) + max(query_like, out) * _FLOAT


def _block_bytes(header: Header, sequence: TracedSequence, policies: Sequence[CachePolicy]) -> int:
    """Buffers of the widest block, or of the dense rows that details are measured on."""
    block = max(
        _buffers(policy) * BLOCK * _heads_together(header, policy) * max(_widths(policy, sequence))
        for policy in policies
    )
    dense = SAMPLED_ROWS * sequence.tokens * (header.group + 5) * 2 * _FLOAT
    return max(block * _FLOAT, dense)


def _buffers(policy: CachePolicy) -> int:
    has_memory = isinstance(policy, MemoryPolicy) and policy.has_memory
    return _MEMORY_BUFFERS if has_memory else _BUFFERS


def _memory_bytes(header: Header, policy: CachePolicy) -> int:
    """A memory in one layer, and what it makes of the tokens of one eviction."""
    if not (isinstance(policy, MemoryPolicy) and policy.has_memory):
        return 0
    law, dims = policy.occupancy, header.head_dim + header.value_dim
    taken = law.interval * (dims + header.group * 4)
    slots = law.state_slots * dims + policy.memory_floats(header.head_dim, header.group)
    assigned = 2 * law.interval * law.state_slots  # int64, and as many float32 again
    hidden = 0
    if policy.needs_decoder:  # some rows per head: as wide as all queries, and the network's inside
        hidden = law.state_slots * header.group * header.head_dim * 8
    per_head = _MEMORY_COPIES * (taken + slots + hidden) + 2 * assigned
    return len(header.kv_heads) * per_head * _FLOAT


def _heads_together(header: Header, policy: CachePolicy) -> int:
    """Query heads that a lane of the policy takes at once."""
    is_whole = not is_compiled(policy) or getattr(policy, "scope_is_layer", False)
    return header.group * (len(header.kv_heads) if is_whole else 1)


def _oracle_bytes(sequence: TracedSequence, policies: Sequence[CachePolicy]) -> int:
    """Every pair of an eviction and a token that it may take, for every law, and as much again.

    The laws of a unit are held together; solving one takes at most about its own size.
    """
    laws = {replace(_law(policy, sequence), state_slots=0) for policy in policies}
    pairs = [
        sum(range(first, sequence.tokens, law.interval))
        for law in laws
        if (first := law.next_due(0)) is not None
    ]
    return 8 * (sum(pairs) + max(pairs, default=0))


def _result_bytes(header: Header, tokens: int) -> int:
    """What is kept of one policy in one layer: a mass per row, a time per token, an error."""
    rows, kv_heads = -(-tokens // header.query_stride), len(header.kv_heads)
    return kv_heads * (header.group * rows + tokens) * _FLOAT + rows * 8


def walk_seconds(
    header: Header,
    sequence: TracedSequence,
    policy: CachePolicy,
    *,
    outputs: bool = True,
    in_core: bool | None = None,
) -> float:
    """Seconds of one policy in one layer on one processor.

    Args:
        header: Sizes of the layer.
        sequence: How many tokens there are, and how many of them are the prompt.
        policy: The policy.
        outputs: Whether values are attended too.
        in_core: Whether the core's look-ahead walks it; default where a replay has nothing faster.
    """
    if len(policy.members) > 1:  # which layers are whose is not looked at
        parts = (
            walk_seconds(header, sequence, member, outputs=outputs, in_core=in_core)
            for member in policy.members
        )
        return sum(parts) / len(policy.members)
    in_core = not is_compiled(policy) if in_core is None else in_core
    tokens = sequence.tokens
    rows = -(-tokens // header.query_stride)
    heads = len(header.kv_heads) * header.group
    interval = policy.occupancy.interval
    cells = sum(_widths(policy, sequence)) * (heads * rows * BLOCK / tokens)
    dims = header.head_dim + (header.value_dim if outputs else 0)
    machine = speed()
    together = heads if in_core else _heads_together(header, policy)
    blocks = -(-tokens // BLOCK) * (heads // together)
    if in_core:  # between evictions Python takes about as long as for a block
        blocks += _CORE_BLOCKS * (-(-tokens // interval) + blocks)
    passes = 2 * _PASSES if in_core else _PASSES  # copies of masked logits
    walking = cells * (2 * dims * machine.multiply_add + passes * machine.exponential)
    return walking + blocks * _BLOCK_SECONDS


def _shared_work(header: Header, tokens: int, num_policies: int, details: bool) -> float:
    """Seconds of reading one layer, and of the rows of full attention that details take."""
    rows, heads = -(-tokens // header.query_stride), len(header.kv_heads) * header.group
    numbers = heads * rows * (header.head_dim + header.value_dim)
    numbers += len(header.kv_heads) * tokens * (header.head_dim + header.value_dim)
    machine = speed()
    seconds = numbers * _READ_PASSES * machine.exponential
    if details:
        cells = min(rows, SAMPLED_ROWS) * tokens
        logits = 2 * header.head_dim * machine.multiply_add + _DETAIL_PASSES * machine.exponential
        seconds += cells * heads * logits
        seconds += (
            cells * len(header.kv_heads) * num_policies * _DETAIL_PASSES * machine.exponential
        )
    return seconds


def _law(policy: CachePolicy, sequence: TracedSequence) -> Occupancy:
    """The policy's occupancy law, settled by the sequence's prompt."""
    return policy.occupancy.of_prompt(sequence.prompt_len)


def _widths(policy: CachePolicy, sequence: TracedSequence) -> list[int]:
    """Most columns of each block of the sequence: slots held, a memory's too, and the block."""
    law, tokens = _law(policy, sequence), sequence.tokens
    limits = [(first, law.limit(first)) for first in range(0, tokens, BLOCK)]
    return [
        min(tokens, first + BLOCK, tokens if limit is None else limit + law.state_slots + BLOCK)
        for first, limit in limits
    ]


@dataclass(frozen=True)
class Speed:
    """Seconds per element on one thread of this machine."""

    multiply_add: float
    exponential: float


@cache
def speed() -> Speed:
    """Measure this machine for some milliseconds."""
    x, y, z = torch.ones(512, 128), torch.ones(128, 1024), torch.zeros(512, 1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = min(_timed(lambda: torch.mm(x, y)) for _ in range(4))
        exponential = min(_timed(z.exp) for _ in range(4))
    finally:
        torch.set_num_threads(threads)
    return Speed(product / (2 * 512 * 128 * 1024), exponential / z.numel())


def _timed(run: Callable[[], object]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


def resident_bytes() -> int:
    """Memory that this process holds; where that is not told, the most it has held so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text("ascii").split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
