"""The flags of ``--kv-policy`` and its companions on vLLM's own command line.

vLLM loads plugins right before it declares its engine flags, and offers them no hook there.
Wrapping that one static method adds the flags; their actions write where
``--additional-config`` would, so that nothing else of vLLM needs to know.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from kvpolicy import PolicyError, parse
from kvpolicy_vllm.admission import ALLOW_KEY, allowed_names
from kvpolicy_vllm.capture import Capture
from kvpolicy_vllm.config import CAPTURE_KEY, KEY, LOG_KEY, WORKER, check_capture


def engine_settings(
    spec: str, capture: Any = None, *, allow: Any = None, log: bool = False
) -> dict[str, Any]:
    """Engine arguments that put a policy to work, and record or log requests if asked to.

    Raises:
        PolicyError: The spec, the capture or a name is wrong, or they do not fit.
    """
    policy = parse(spec)
    config: dict[str, Any] = {KEY: str(policy)}
    allowed = allowed_names(allow, policy)
    if allow is not None:
        config[ALLOW_KEY] = list(allowed)
    if capture is not None:
        check_capture(policy)
        capture = Capture.of(capture)
        capture.check_directory()
        config[CAPTURE_KEY] = capture.as_dict()
    if log:
        config[LOG_KEY] = True
    return {"additional_config": config, "worker_cls": WORKER}


class _SettingAction(argparse.Action):
    """Stores the value of one of our flags in the engine arguments' namespace."""

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
        settings = _settings(parser, {**given, self.dest: values})
        namespace.additional_config = {**given, **settings["additional_config"]}
        if getattr(namespace, "worker_cls", "auto") == "auto":
            namespace.worker_cls = settings["worker_cls"]


def _settings(parser: argparse.ArgumentParser, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments for what our flags and ``--additional-config`` asked for so far."""
    try:
        return engine_settings(
            asked.get(KEY, "full"),
            asked.get(CAPTURE_KEY),
            allow=asked.get(ALLOW_KEY),
            log=bool(asked.get(LOG_KEY)),
        )
    except PolicyError as error:
        parser.error(str(error))


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
        ours = (KEY, ALLOW_KEY, CAPTURE_KEY, LOG_KEY)
        kept = {key: given[key] for key in ours if key in given}
        merged = {**kept, **values}
        if KEY in kept and ALLOW_KEY in values:
            # A wrong list is bad usage, before an engine starts.
            merged |= _settings(parser, merged)["additional_config"]
        setattr(namespace, self.dest, merged)


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
        "--kv-policy-allow",
        action=_SettingAction,
        default=argparse.SUPPRESS,
        metavar="NAME[,NAME...]",
        help="policies that requests may bring; unless given, the server's own with other settings",
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
