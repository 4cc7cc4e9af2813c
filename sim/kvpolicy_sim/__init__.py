"""Trace capture and replay: planned to live here, not written yet; there is nothing to import."""
