"""What can be replayed exactly from a trace; the rest is refused, with what to change."""

from collections.abc import Sequence
from typing import get_args

from kvpolicy import CachePolicy, EvictionPolicy, PolicyError, UnsupportedError
from kvpolicy.extras import require
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.policies.infini import Infini
from kvpolicy.policy import NEEDS
from kvpolicy.trace import Header, Trace
from kvpolicy.trace import Sequence as TracedSequence
from kvpolicy_sim.lanes import Level
from kvpolicy_sim.rules import is_compiled


def require_oracle(header: Header) -> None:
    """Raise UnsupportedError unless the offline optimum can be computed of a trace."""
    if header.query_stride > 1:
        raise UnsupportedError(
            f"the oracle needs every query and the trace has every {header.query_stride}th; "
            "capture with query_stride=1, or replay without the oracle"
        )
    require("numba", "the oracle")


def require_supported(
    header: Header,
    policies: Sequence[CachePolicy],
    level: str,
    *,
    has_weights: bool = False,
) -> None:
    """Raise unless every policy's decisions can be replayed exactly.

    Args:
        header: The trace's.
        policies: The policies.
        level: What they observe.
        has_weights: Whether the model's weights are given beside the trace.

    Raises:
        PolicyError: There is no policy, or no such level.
        UnsupportedError: With the policy, why, and what to change.
    """
    if not policies:
        raise PolicyError("nothing to replay: give at least one policy, such as h2o:budget=256")
    if level not in get_args(Level):
        raise PolicyError(f"unknown level {level!r}; choose from {', '.join(get_args(Level))}")
    for policy in policies:
        for layer in header.layers:
            policy.of_layer(layer)  # raises where there is none
        for member in policy.members:
            reason = _unsupported(header, member)
            reason = reason or _unsupported_memory(header, member, has_weights)
            if reason:
                raise UnsupportedError(f"{member}: {reason}")


def _unsupported(header: Header, policy: CachePolicy) -> str | None:
    """Say why a policy cannot be replayed from a trace."""
    if header.query_stride > 1 and (policy.needs or not is_compiled(policy)):
        return (
            f"its decisions need every query and the trace has every {header.query_stride}th; "
            "capture with query_stride=1"
        )
    if not isinstance(policy, EvictionPolicy):
        return None
    unknown = sorted(set(policy.needs) - set(NEEDS))
    if unknown:
        return f"it needs {unknown}, and a replay shows {NEEDS}; declare needs among these"
    if policy.rope == "reindex" and (header.rope is None or header.rope.kind != "default"):
        return "rope=reindex needs a trace with plain RoPE; use rope=keep"
    if policy.scope_is_layer and len(header.kv_heads) < header.num_kv_heads:
        return (
            f"scope=layer takes the mean over all {header.num_kv_heads} KV heads and the trace "
            f"has {len(header.kv_heads)}; capture all heads, or use scope=head"
        )
    return None


def require_prompts(
    trace: Trace, sequences: Sequence[TracedSequence], policies: Sequence[CachePolicy]
) -> None:
    """Raise unless sequences have the prompts that policies set apart, and tokens behind them.

    Raises:
        UnsupportedError: With the policy, the sequence, and how to capture one that serves.
    """
    apart = [policy for policy in policies if policy.needs_prompt]
    for sequence in sequences if apart else ():
        if 0 < sequence.prompt_len < sequence.tokens:
            continue
        is_missing = sequence.prompt_len == 0
        what = "no prompt" if is_missing else f"{sequence.tokens} tokens, all of them prompt"
        raise UnsupportedError(
            f"{apart[0]} sets the prompt apart, and sequence {sequence.index} of {trace.path} has "
            f"{what}; a replay needs a prompt and tokens behind it: capture with --prompt-len N "
            "(prompt_len= in Python), or with --new-tokens N, or choose other --sequences"
        )


def needs_weights(policy: CachePolicy) -> bool:
    """Whether a memory of the policy passes rows through the model's layers."""
    return any(
        isinstance(member, MemoryPolicy) and member.has_memory and member.needs_decoder
        for member in policy.members
    )


def _unsupported_memory(header: Header, policy: CachePolicy, has_weights: bool) -> str | None:
    """Say why a policy's memory cannot be replayed from a trace."""
    if not (isinstance(policy, MemoryPolicy) and policy.has_memory):
        return None
    reason = reason_against_raw_keys(header)
    if reason:
        return f"its memory looks at keys before their rotation, and {reason}"
    if needs_weights(policy) and not has_weights:
        return (
            "its memory passes through the layers' weights, which a trace has not; give the "
            "model's folder with --weights (model= in Python), or use level=kv"
        )
    is_whole = needs_weights(policy) or _has_trained_gates(policy)
    if is_whole and len(header.kv_heads) < header.num_kv_heads:
        return (
            f"it needs all {header.num_kv_heads} KV heads of a layer and the trace has "
            f"{len(header.kv_heads)}; capture all heads"
        )
    return None


def _has_trained_gates(policy: CachePolicy) -> bool:
    if not (isinstance(policy, Infini) and isinstance(policy.gate, str)):
        return False
    return policy.gate not in ("closed", "calibrated")


def reason_against_raw_keys(header: Header) -> str | None:
    """Say why queries and keys of a trace cannot be turned back to before their rotation."""
    rope = header.rope
    if rope is None:
        return (
            "the trace's header does not say how they are rotated; capture a model with rotary "
            "embeddings again, or use a policy that only evicts"
        )
    if rope.interleaved or 2 * len(rope.inverse_frequencies) != header.head_dim:
        how = "interleaved pairs" if rope.interleaved else "only a part of each head"
        return f"the trace's RoPE rotates {how}; use a policy that only evicts"
    return None


def choose_layers(header: Header, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, in order.

    Raises:
        PolicyError: One was not captured.
    """
    chosen = header.layers if layers is None else tuple(sorted(set(layers)))
    missing = sorted(set(chosen) - set(header.layers))
    if missing or not chosen:
        raise PolicyError(
            f"layers {missing or list(chosen)} are not in the trace; it has {list(header.layers)}"
        )
    return chosen


def choose_sequences(trace: Trace, sequences: Sequence[int] | None) -> tuple[TracedSequence, ...]:
    """The sequences asked for, in order.

    Raises:
        PolicyError: One is not in the trace.
    """
    known = {sequence.index: sequence for sequence in trace.sequences}
    chosen = sorted(known if sequences is None else set(sequences))
    missing = [index for index in chosen if index not in known]
    if missing or not chosen:
        raise PolicyError(
            f"sequences {missing or chosen} are not in the trace; it has {sorted(known)}"
        )
    return tuple(known[index] for index in chosen)
