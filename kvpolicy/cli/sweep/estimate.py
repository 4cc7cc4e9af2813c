"""What an evaluation's unit will take: memory as a bound, time as a guess."""

from typing import TYPE_CHECKING

from kvpolicy.cli.sweep.units import WEIGHT_FILES, Cost, model_files
from kvpolicy.cli.sweep.work import MOST_REMEMBERED
from kvpolicy.lookahead import BLOCK
from kvpolicy.model_facts import ELEMENT_BYTES
from kvpolicy.policy import CachePolicy
from kvpolicy.registry import parse
from kvpolicy.trace import Header
from kvpolicy.trace import Sequence as TracedSequence

if TYPE_CHECKING:
    from kvpolicy.cli.sweep.sources import EvalSource

_FLOAT = 4

_PREDICTIONS = 6
"""Predictions alive at once: raw, in float32, as log-probabilities, likewise the reference's."""

_ACTIVATIONS = 24
"""A token's activations alive at once, in multiples of what its query heads take."""

_BUFFERS = 6
"""Arrays of an attention block's size that are alive at once."""


def estimate_eval(source: "EvalSource", policy: CachePolicy) -> Cost:
    """Estimate a unit: the policy's forwards, and the full cache's as its reference."""
    from kvpolicy_hf.closed_loop import MOST_ROWS
    from kvpolicy_sim.estimate import ALLOWANCE, resident_bytes, speed, walk_seconds

    facts, context, num_samples = source.facts, source.entry.context, len(source.samples)
    rows = min(MOST_ROWS, num_samples)
    prompt = max(sample.prompt_tokens for sample in source.samples)
    predicted = max(sample.num_predicted for sample in source.samples)
    weights = _weight_bytes(source)

    policies = {policy, parse("full")}
    passing = 2 * (weights / _FLOAT) * context * speed().multiply_add
    sequence = TracedSequence(index=0, tokens=context, prompt_len=prompt)
    layer = _layer_of(source, rows)  # rows of a batch advance together, like so many heads
    walking = sum(walk_seconds(layer, sequence, each, in_core=True) for each in policies)
    seconds = num_samples * (len(policies) * passing + facts.num_layers * walking / rows)

    width = facts.num_query_heads * facts.head_dim
    cache = facts.num_layers * facts.num_kv_heads * 2 * facts.head_dim * context
    blocks = facts.num_query_heads * BLOCK * context * _BUFFERS
    predictions = predicted * source.vocabulary_size * _PREDICTIONS
    numbers = rows * (cache + blocks + predictions + context * width * _ACTIVATIONS)
    working = numbers * _FLOAT + MOST_REMEMBERED
    return Cost(resident_bytes() + ALLOWANCE + weights + working, seconds)


def _weight_bytes(source: "EvalSource") -> int:
    """The model's weights in float32, whatever its files have."""
    files = (x for x in model_files(source.entry.model) if x.suffix in WEIGHT_FILES)
    stored = sum(path.stat().st_size for path in files)
    return stored * _FLOAT // ELEMENT_BYTES.get(source.facts.dtype or "", _FLOAT)


def _layer_of(source: "EvalSource", rows: int) -> Header:
    """The sizes of one of the model's layers, as of a trace with the heads of all rows."""
    facts = source.facts
    return Header(
        model=source.entry.model_name,
        num_layers=1,
        num_query_heads=facts.num_query_heads * rows,
        num_kv_heads=facts.num_kv_heads * rows,
        layers=(0,),
        kv_heads=tuple(range(facts.num_kv_heads * rows)),
        head_dim=facts.head_dim,
        value_dim=facts.head_dim,
        dtype="float32",
        scale=facts.head_dim**-0.5,
    )
