"""Replay a trace in a process of its own: what it was expected to take, and what it took.

Prints the estimate before it begins and the outcome after it, a line of JSON each. Usage:
replay_memory.py TRACE THREADS POLICY...
"""

import json
import sys
from pathlib import Path
from time import perf_counter, process_time

from kvpolicy import parse
from kvpolicy.trace import Trace
from kvpolicy_sim import replay
from kvpolicy_sim.estimate import estimate


def memory(field: str) -> int:
    """Bytes of this process, as Linux counts them: VmRSS held now, VmHWM the most ever.

    Not getrusage: a process inherits the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10


def main() -> None:
    """Estimate, replay, and say how it went."""
    path, threads, *specs = sys.argv[1:]
    with Trace.open(path) as trace:
        policies = [parse(spec) for spec in specs]
        num_layers, held = len(trace.header.layers), memory("VmRSS")
        expected = estimate(trace.header, trace.sequences, num_layers, policies, int(threads))
        print(json.dumps({"bytes": expected.bytes, "seconds": expected.seconds, "held": held}))
        wall, cpu = perf_counter(), process_time()
        replay(trace, policies, threads=int(threads))
        wall, cpu = perf_counter() - wall, process_time() - cpu
    print(json.dumps({"bytes": memory("VmHWM"), "seconds": wall, "cpu": cpu}))


if __name__ == "__main__":
    main()
