"""Train the bundled model: `python -m kvpolicy.bundled.training --help`."""

import argparse
import sys
from pathlib import Path

from kvpolicy.bundled.training.launch import launch
from kvpolicy.bundled.training.train import Settings


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy.bundled.training",
        description="Train the bundled model. Started again with the same --work, it goes on "
        "where it stopped; SIGTERM makes it save and stop.",
    )
    add = parser.add_argument
    add("--books-train", type=Path, required=True, help="folder of .txt files, or tar archive")
    add("--books-heldout", type=Path, required=True, help="folder of .txt files, or tar archive")
    add("--work", type=Path, required=True, help="checkpoint, encoded books, log, process ids")
    add("--out", type=Path, required=True, help="model folder to write")
    add("--processes", type=int, default=2, help="one thread each; as many as free cores")
    add("--max-tokens", type=float, default=16e6, help="end after this many tokens")
    add("--tokens-per-step", type=int, default=2048, help="per process")
    add("--seed", type=int, default=0)
    add("--without-sinks", action="store_true", help="start without attention sinks, to compare")
    add("--attention-cost", type=float, default=0.03, help="nats per token, see train.Settings")
    add("--exact", action="store_true", help="compute in float32, not bfloat16")
    add("--eager", action="store_true", help="do without torch.compile and its C++ compiler")
    given = parser.parse_args(arguments)
    return Settings(
        books_train=given.books_train,
        books_heldout=given.books_heldout,
        work=given.work,
        out=given.out,
        processes=given.processes,
        max_tokens=given.max_tokens,
        tokens_per_step=given.tokens_per_step,
        seed=given.seed,
        has_sinks=not given.without_sinks,
        attention_cost=given.attention_cost,
        is_exact=given.exact,
        is_compiled=not given.eager,
    )


if __name__ == "__main__":
    sys.exit(launch(parse()))
