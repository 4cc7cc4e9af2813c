"""What the process that accepts requests knows of the server's policy.

Requests are validated by a class method that sees no configuration, so whoever configures an
engine from Python or the command line leaves the policy here. Worker processes check again.
"""

from kvpolicy import CachePolicy

_server: list[CachePolicy] = []


def announce(policy: CachePolicy) -> None:
    """Remember the policy of the engine that this process is about to start."""
    _server[:] = [policy]


def server_policy() -> CachePolicy | None:
    """The policy announced last, if any."""
    return _server[0] if _server else None
