"""What the process that accepts requests knows of the server's policy.

Requests are validated by a class method that sees no configuration, so whoever configures an
engine from Python or the command line leaves the policy here. Worker processes check again.
"""

from kvpolicy import CachePolicy
from kvpolicy_vllm.metrics import expose

_server: list[CachePolicy] = []
_recorded: list[bool] = []


def announce(policy: CachePolicy, *, is_recorded: bool = False) -> None:
    """Remember the policy of the engine that this process is about to start, and await figures.

    Args:
        policy: The policy.
        is_recorded: Whether the engine records requests.
    """
    _server[:] = [policy]
    _recorded[:] = [is_recorded]
    expose()


def server_policy() -> CachePolicy | None:
    """The policy announced last, if any."""
    return _server[0] if _server else None


def server_records() -> bool:
    """Whether the engine announced last records requests."""
    return bool(_recorded and _recorded[0])
