"""The flags of ``--kv-policy`` and its companions on vLLM's own command line.

vLLM loads plugins right before it declares its engine flags, and offers them no hook there.
Wrapping that one static method adds the flags; their actions write where
``--additional-config`` would, so that nothing else of vLLM needs to know.
"""

import argparse
from typing import Any

from kvpolicy import PolicyError, parse
from kvpolicy_vllm.capture import Capture
from kvpolicy_vllm.config import CAPTURE_KEY, KEY, LOG_KEY, WORKER, check_capture
from kvpolicy_vllm.frontend import announce


def engine_settings(spec: str, capture: Any = None, *, log: bool = False) -> dict[str, Any]:
    """Engine arguments that put a policy to work, and record or log requests if asked to.

    Raises:
        PolicyError: The spec or the capture is wrong, or they do not fit.
    """
    policy = parse(spec)
    config: dict[str, Any] = {KEY: str(policy)}
    if capture is not None:
        check_capture(policy)
        capture = Capture.of(capture)
        capture.check_directory()
        config[CAPTURE_KEY] = capture.as_dict()
    if log:
        config[LOG_KEY] = True
    announce(policy, is_recorded=capture is not None)
    return {"additional_config": config, "worker_cls": WORKER}


class _SettingAction(argparse.Action):
    """Stores a policy, a capture or the wish for a log in the engine arguments' namespace."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Validate the value and merge its settings with those given so far."""
        given = {**(getattr(namespace, "additional_config", None) or {})}
        if self.dest == LOG_KEY:
            values = True
        asked = {**given, self.dest: values}
        try:
            settings = engine_settings(
                asked.get(KEY, "full"), asked.get(CAPTURE_KEY), log=bool(asked.get(LOG_KEY))
            )
        except PolicyError as error:
            parser.error(str(error))
        namespace.additional_config = {**given, **settings["additional_config"]}
        if getattr(namespace, "worker_cls", "auto") == "auto":
            namespace.worker_cls = settings["worker_cls"]


class _MergedConfig(argparse._StoreAction):  # pyright: ignore[reportPrivateUsage]
    """``--additional-config`` that keeps what our flags gave before it, instead of dropping it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the new settings beside ours."""
        given = getattr(namespace, self.dest, None) or {}
        kept = {key: given[key] for key in (KEY, CAPTURE_KEY, LOG_KEY) if key in given}
        setattr(namespace, self.dest, {**kept, **values})


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Declare ``--kv-policy`` and its companions once."""
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
        action=_SettingAction,
        default=argparse.SUPPRESS,
        metavar="SPEC",
        help="retention policy of the KV cache, e.g. h2o:budget=1024; see `kvpolicy policies`",
    )
    group.add_argument(
        "--kv-policy-capture",
        action=_SettingAction,
        default=argparse.SUPPRESS,
        metavar="DIRECTORY[,KEY=VALUE...]",
        help="record requests under --kv-policy full as traces, e.g. traces,every=10",
    )
    group.add_argument(
        "--kv-policy-log",
        action=_SettingAction,
        nargs=0,
        default=argparse.SUPPRESS,
        help="log a line of figures for every finished request",
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
