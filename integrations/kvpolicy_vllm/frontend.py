"""What the process that accepts requests knows of the server's policy.

Requests are validated by a class method that sees no configuration, so whoever configures an
engine from Python or the command line leaves the policy here. Worker processes check again.
"""

from dataclasses import dataclass

from kvpolicy import CachePolicy
from kvpolicy_vllm.admission import allowed_names
from kvpolicy_vllm.metrics import expose


@dataclass(frozen=True)
class Server:
    """An engine as the process that accepts its requests knows it.

    Attributes:
        policy: Its policy.
        allowed: Names of the policies that requests may bring.
        is_recorded: Whether it records requests.
    """

    policy: CachePolicy
    allowed: tuple[str, ...]
    is_recorded: bool


_latest: list[Server] = []


def announce(
    policy: CachePolicy, *, allowed: tuple[str, ...] | None = None, is_recorded: bool = False
) -> None:
    """Remember the policy of the engine that this process is about to start, and await figures.

    Args:
        policy: The policy.
        allowed: Names of the policies that requests may bring; None for the engine's own.
        is_recorded: Whether the engine records requests.
    """
    if allowed is None:
        allowed = allowed_names(None, policy)
    _latest[:] = [Server(policy, allowed, is_recorded)]
    expose()


def announced() -> Server | None:
    """The engine announced last, if any."""
    return _latest[0] if _latest else None
