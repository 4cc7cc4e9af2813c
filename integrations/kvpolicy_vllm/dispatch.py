"""Chooses the attention backend when vLLM resolves it: stock, ours, or a refusal.

Every entry of vLLM's backend table points to an attribute of this module. Attributes are
computed on access (PEP 562), while the engine's configuration is current. Without a policy
the answer is vLLM's own class, so that an unconfigured engine runs nothing of ours.
"""

from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvpolicy import UnsupportedError
from kvpolicy_vllm.config import configured_policy

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

SUPPORTED = "CPU_ATTN"
"""The backend whose pages and kernel this host knows."""

_stock: dict[str, str] = {}


def install() -> None:
    """Route every backend of vLLM's table through this module; idempotent."""
    for member in AttentionBackendEnum:
        path = member.value
        if path and member.name not in _stock:
            _stock[member.name] = member.get_path()
            register_backend(member, f"{__name__}.{member.name}")


def forget_choice() -> None:
    """Make vLLM choose the backend of the next engine afresh.

    vLLM remembers its choice per process without the configuration in the key, so that a
    second engine of the process would run the first one's classes.
    """
    from vllm.v1.attention.selector import (
        _cached_get_attn_backend,  # pyright: ignore[reportPrivateUsage]
    )

    _cached_get_attn_backend.cache_clear()


def __getattr__(name: str) -> "type[AttentionBackend]":
    """Resolve a backend of vLLM's table under the current configuration."""
    if name not in _stock:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock: Any = resolve_obj_by_qualname(_stock[name])
    vllm_config = get_current_vllm_config_or_none()
    policy = configured_policy(vllm_config)
    if policy is None or vllm_config is None:
        return stock
    if name != SUPPORTED:
        raise UnsupportedError(
            f"kv_policy={policy} runs on vLLM's {SUPPORTED} backend only, not on {name}; "
            "drop the policy, or run a model with plain attention on the CPU platform"
        )
    from kvpolicy_vllm.backend import backend_for

    return backend_for(vllm_config, policy)
