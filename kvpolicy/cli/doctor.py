"""``kvpolicy doctor``: what this environment can run, and what to change."""

from collections.abc import Sequence
from dataclasses import asdict

from kvpolicy.cli import FAILED
from kvpolicy.cli.arguments import command_parser
from kvpolicy.cli.diagnosis import diagnose
from kvpolicy.cli.environment import read_environment
from kvpolicy.cli.output import Output, table

EXAMPLES = """
  kvpolicy doctor
  kvpolicy doctor --json - | jq '.findings[] | select(.level == "error")'
"""
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def run(arguments: Sequence[str]) -> int:
    """Examine the environment; 1 if something that is installed cannot work."""
    parser = command_parser(
        "doctor",
        "Examine this environment: distributions, versions, backends and known traps, each with "
        "what to change. Exits with 1 if something that is installed cannot work.",
        EXAMPLES,
    )
    output = Output(parser.parse_args(arguments).json)
    environment = read_environment()
    findings = diagnose(environment)
    works = all(finding.level != "error" for finding in findings)
    rows = table("", "subject", "finding", left=3)
    for finding in findings:
        style = STYLES[finding.level]
        rows.add_row(f"[{style}]{finding.level}[/]", finding.subject, finding.detail)
        if finding.remedy:
            rows.add_row("", "", f"-> {finding.remedy}")
    output.print(rows)
    output.print("\nEverything installed can work." if works else "\nSomething cannot work.")
    output.json(
        {
            "schema": 1,
            "ok": works,
            "environment": asdict(environment),
            "findings": [asdict(finding) for finding in findings],
        }
    )
    return 0 if works else FAILED
