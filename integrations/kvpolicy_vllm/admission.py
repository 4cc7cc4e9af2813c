"""Which policies requests may bring: by name, from a list that the server gives.

The list is a setting beside the policy, ``{"kv_policy_allow": ["h2o", "tova"]}``. Without it a
request may change the settings of the server's own policy and nothing else. There is no
wildcard, which would grow with whatever is installed next.
"""

from collections.abc import Sequence
from typing import Any

from kvpolicy import CachePolicy, PolicyError, available
from kvpolicy.registry import is_registered

ALLOW_KEY = "kv_policy_allow"
"""Key of the list in `additional_config`: names, or text with commas between them."""


def allowed_names(setting: Any, server: CachePolicy) -> tuple[str, ...]:
    """Names of the policies that requests may bring.

    Args:
        setting: A list of names or ``a,b``, empty for none; None for the server's own.
        server: The server's policy.

    Raises:
        PolicyError: It is no list of names, or a name is unknown.
    """
    if setting is None:
        return (server.name,) if is_registered(type(server)) else ()
    names = setting.split(",") if isinstance(setting, str) and setting else setting or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise PolicyError(
            f"{ALLOW_KEY} is a list of policies' names such as 'h2o,tova', got {setting!r}"
        )
    names = tuple(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in (known := available()):
            raise PolicyError(
                f"{ALLOW_KEY}: unknown policy {name!r}; known policies: {', '.join(known)}; "
                "requests cannot use import paths, so give your own an entry point"
            )
    return names


def check_name(name: str, allowed: Sequence[str]) -> None:
    """Refuse a request whose policy's name is not on the list.

    Raises:
        PolicyError: With the names that are.
    """
    if name not in allowed:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
        raise PolicyError(
            f"a request asks for the policy {name!r}, but this server {takes}; choose from these, "
            f"or start it with --kv-policy-allow {','.join((*allowed, 'NAME'))}"
        )
