"""Traces: the queries, keys and values of real attention, in a file that survives crashes.

A trace is written once, by appending, and read through a memory map. The format is documented
byte by byte in docs/reference/trace-format.md.
"""

from kvpolicy.trace.header import Header, Mark, Rope, Sequence
from kvpolicy.trace.reader import Trace
from kvpolicy.trace.writer import TraceWriter

__all__ = ["Header", "Mark", "Rope", "Sequence", "Trace", "TraceWriter"]
