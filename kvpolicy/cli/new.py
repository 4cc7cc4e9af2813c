"""``kvpolicy new``: a package for a policy of one's own."""

from collections.abc import Sequence
from pathlib import Path

from kvpolicy.cli.arguments import command_parser
from kvpolicy.cli.output import Output
from kvpolicy.scaffold import Names, write_package

EXAMPLES = """
  kvpolicy new keen
  kvpolicy new keen-eye --into policies
"""


def run(arguments: Sequence[str]) -> int:
    """Write the package."""
    parser = command_parser(
        "new",
        "Make a package with a retention policy that works: its class, an entry point, so that "
        "specs find it by its name in every process, and tests, which pass.",
        EXAMPLES,
    )
    parser.add_argument("name", metavar="NAME", help="of the package and the policy")
    parser.add_argument(
        "--into", default=".", metavar="DIR", help="folder to make it in (default: this one)"
    )
    options = parser.parse_args(arguments)
    output = Output(options.json)
    names = Names.of(options.name)
    files = write_package(names, Path(options.into))
    folder = Path(options.into) / names.distribution
    for file in files:
        output.print(f"wrote {file}")
    output.print(
        f"\nnext:\n"
        f"  cd {folder}\n"
        f"  pip install --editable .     # so that specs find {names.package}:budget=N\n"
        f"  python -m pytest\n"
        f"  kvpolicy check {names.package}\n"
    )
    output.json(
        {
            "schema": 1,
            "folder": str(folder),
            "package": names.package,
            "class": f"{names.package}.policy:{names.policy_class}",
            "spec": f"{names.package}:budget=256",
            "files": [str(file) for file in files],
        }
    )
    return 0
