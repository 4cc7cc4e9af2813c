"""kvpolicy's simulator: capture what attention sees once, replay any policy on it.

trace = capture(model, input_ids, "t.kvtrace")
report = replay(trace, ["full", "window:budget=256", "h2o:budget=256"])
report.as_dict()
"""

from kvpolicy.trace import Trace, TraceWriter
from kvpolicy_sim.capture import capture
from kvpolicy_sim.fit import fit
from kvpolicy_sim.recommend import recommend
from kvpolicy_sim.replay import replay
from kvpolicy_sim.report import Report

__all__ = ["Report", "Trace", "TraceWriter", "capture", "fit", "recommend", "replay"]
