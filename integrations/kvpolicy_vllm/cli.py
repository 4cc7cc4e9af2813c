"""The ``--kv-policy`` flag of vLLM's own command line.

vLLM loads plugins right before it declares its engine flags, and offers them no hook there.
Wrapping that one static method adds the flag; the flag's action writes where
``--additional-config`` would, so that nothing else of vLLM needs to know.
"""

import argparse
from typing import Any

from kvpolicy import PolicyError, parse
from kvpolicy_vllm.config import KEY
from kvpolicy_vllm.frontend import announce

WORKER = "kvpolicy_vllm.worker.PolicyWorker"


def engine_settings(spec: str) -> dict[str, Any]:
    """Engine arguments that put a policy to work.

    Raises:
        PolicyError: The spec is wrong.
    """
    policy = parse(spec)
    announce(policy)
    return {"additional_config": {KEY: str(policy)}, "worker_cls": WORKER}


class _PolicyAction(argparse.Action):
    """Stores a policy in the engine arguments' namespace."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Validate the spec and merge its settings with those given so far."""
        try:
            settings = engine_settings(values)
        except PolicyError as error:
            parser.error(str(error))
        merged = {**(getattr(namespace, "additional_config", None) or {})}
        namespace.additional_config = {**merged, **settings["additional_config"]}
        if getattr(namespace, "worker_cls", "auto") == "auto":
            namespace.worker_cls = settings["worker_cls"]


class _MergedConfig(argparse._StoreAction):  # pyright: ignore[reportPrivateUsage]
    """``--additional-config`` that keeps a policy given before it, instead of dropping it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the new settings beside the policy's."""
        given = getattr(namespace, self.dest, None) or {}
        kept = {KEY: given[KEY]} if KEY in given else {}
        setattr(namespace, self.dest, {**kept, **values})


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Declare ``--kv-policy`` once."""
    declared = parser._option_string_actions  # pyright: ignore[reportPrivateUsage]
    if "--kv-policy" in declared:
        return
    config = declared.get("--additional-config")
    if config is not None:
        # vLLM moves dotted settings to the end of the line, past any --kv-policy.
        config.__class__ = _MergedConfig
    group = parser.add_argument_group("KVPolicy", "KV-cache retention policies (kvpolicy)")
    group.add_argument(
        "--kv-policy",
        action=_PolicyAction,
        default=argparse.SUPPRESS,
        metavar="SPEC",
        help="retention policy of the KV cache, e.g. h2o:budget=1024; see `kvpolicy policies`",
    )


def install() -> None:
    """Add the flag to vLLM's engine arguments; idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, "adds_kv_policy", False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flag(parser)
        return parser

    add_cli_args.adds_kv_policy = True  # pyright: ignore[reportFunctionMemberAccess]
    EngineArgs.add_cli_args = staticmethod(add_cli_args)
