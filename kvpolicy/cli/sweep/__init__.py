"""``kvpolicy sweep``: grids of traces and models x policies x budgets, resumable.

Workers import this package before numeric libraries are told their threads: it stays empty.
"""
