"""Refuses input sessions: requests whose input arrives in pieces while they run.

vLLM counts every piece, and the answers before it, as prompt from then on. It validates a
session in the process that accepts requests, and offers no hook there.
"""

from functools import wraps
from typing import Any

from kvpolicy import UnsupportedError
from kvpolicy_vllm.config import configured_policy, refusal


def install() -> None:
    """Let vLLM refuse sessions to an engine under a policy; idempotent."""
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM._add_streaming_input_request  # pyright: ignore[reportPrivateUsage]
    if getattr(original, "refuses_sessions", False):
        return

    @wraps(original)
    async def add(self: AsyncLLM, *args: Any, **kwargs: Any) -> Any:
        policy = configured_policy(self.vllm_config)
        if policy is not None:
            name = "sessions whose input arrives in pieces"
            raise UnsupportedError(f"kv_policy={policy} does not work with {refusal(name)}")
        return await original(self, *args, **kwargs)

    add.refuses_sessions = True  # pyright: ignore[reportAttributeAccessIssue]
    AsyncLLM._add_streaming_input_request = add  # pyright: ignore[reportPrivateUsage]
