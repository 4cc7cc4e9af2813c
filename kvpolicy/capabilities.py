"""Which policies each host runs, stated without importing any host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from kvpolicy.policy import NEEDS, CachePolicy, EvictionPolicy, parameters


@dataclass(frozen=True)
class Host:
    """What a host gives to policies.

    Attributes:
        needs: What it shows to policies.
        refuses: Spec values that it does not implement.
        only: What it asks of some policies, by their names.
    """

    needs: tuple[str, ...]
    refuses: tuple[tuple[str, str], ...]
    only: Mapping[str, str] = field(default_factory=dict[str, str])


HOSTS = {
    "transformers": Host(needs=NEEDS, refuses=()),
    "vllm": Host(
        needs=NEEDS,
        refuses=(("level", "model"),),
        only={"mix": "parts with equal budgets and intervals, without memories"},
    ),
    "simulator": Host(needs=NEEDS, refuses=()),
}
"""Tests hold this table to what the hosts themselves accept and refuse."""


def capability(cls: type[CachePolicy], host: str) -> str:
    """Whether a host runs a policy: ``yes``, ``yes, not ...``, ``yes, only ...``, ``no: ...``."""
    unknown = sorted(set(cls.needs) - set(HOSTS[host].needs))
    if unknown:
        return f"no: it needs {', '.join(unknown)}"
    table = parameters(cls)
    for key in table:
        choices = {(key, value) for value in get_args(table[key].kind)}
        if choices and choices <= {*HOSTS[host].refuses}:
            return f"no: it needs {', '.join(f'{key}={value}' for key, value in choices)}"
    refused = [
        f"{key}={value}"
        for key, value in HOSTS[host].refuses
        if key in table and value in get_args(table[key].kind)
    ]
    if cls.name in HOSTS[host].only:
        return f"yes, only {HOSTS[host].only[cls.name]}"
    return f"yes, not {', '.join(refused)}" if refused else "yes"


def settings(cls: type[CachePolicy]) -> dict[str, bool]:
    """Which settings that change what a policy keeps it takes, in every host that runs it."""
    evicts = issubclass(cls, EvictionPolicy)
    table = parameters(cls)
    apart = evicts and cls.sets_prompts_apart
    bulk_only = "prefill" in table and get_args(table["prefill"].kind) == ("bulk",)
    return {
        "prefill=bulk": "prefill" in table and apart,
        "protect=prompt": "protect" in table and apart and not bulk_only,
        "rope=reindex": "rope" in table and evicts and cls.reindexable,
    }
