"""What the process that accepts requests knows of the server's policy.

Requests are validated by a class method that sees no configuration. Every process that accepts
them makes one, though: a script's, a server's, and those of a server's further front ends, which
are spawned and share nothing with the one that read the command line. Wrapping that one method
leaves the policy here. Worker processes check again.
"""

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from kvpolicy import CachePolicy
from kvpolicy_vllm.admission import allowed_names
from kvpolicy_vllm.config import configured_capture, configured_names, configured_policy
from kvpolicy_vllm.metrics import expose

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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


def hear(vllm_config: "VllmConfig") -> None:
    """Announce the policy of a configuration, if it has one.

    Raises:
        PolicyError: A setting is wrong.
    """
    policy = configured_policy(vllm_config)
    if policy is not None:
        announce(
            policy,
            allowed=configured_names(vllm_config, policy),
            is_recorded=configured_capture(vllm_config) is not None,
        )


def install() -> None:
    """Hear of every engine that this process configures; idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, "is_heard", False):
        return

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> "VllmConfig":
        vllm_config = original(self, *args, **kwargs)
        hear(vllm_config)
        return vllm_config

    create_engine_config.is_heard = True  # pyright: ignore[reportAttributeAccessIssue]
    EngineArgs.create_engine_config = create_engine_config


def announced() -> Server | None:
    """The engine announced last, if any."""
    return _latest[0] if _latest else None
