"""kvpolicy: pluggable KV-cache retention policies for vLLM, transformers and trace replay."""

from kvpolicy.bundled import bundled_model
from kvpolicy.errors import KVPolicyError, LedgerError, PolicyError, TraceError, UnsupportedError
from kvpolicy.ledger import SEMANTICS, Ledger
from kvpolicy.memory.policy import MemoryPolicy, SlotMemoryPolicy
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import Accumulation, CachePolicy, EvictionPolicy, ScorePolicy, View
from kvpolicy.registry import available, parse, register

__version__ = "0.1.0"

__all__ = [
    "SEMANTICS",
    "Accumulation",
    "CachePolicy",
    "EvictionPolicy",
    "KVPolicyError",
    "Ledger",
    "LedgerError",
    "MemoryPolicy",
    "Occupancy",
    "PolicyError",
    "ScorePolicy",
    "SlotMemoryPolicy",
    "TraceError",
    "UnsupportedError",
    "View",
    "available",
    "bundled_model",
    "parse",
    "register",
]
