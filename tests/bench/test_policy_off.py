"""What an installed plugin costs a server that runs no policy."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.models import random_llama, save_model

pytestmark = [pytest.mark.bench, pytest.mark.vllm]


def median_interval(sample: list[float]) -> tuple[float, float]:
    """95 % interval of the median of independent numbers, whatever their distribution."""
    ordered, half = sorted(sample), 0.98 * math.sqrt(len(sample))
    first = max(0, math.floor(len(sample) / 2 - half))
    return ordered[first], ordered[-1 - first]


def test_time_of_a_step_without_a_policy(tmp_path, capsys):
    """Prints the time per step beside vLLM alone: the median of pairs and its interval."""
    model = save_model(random_llama(), tmp_path)
    command = [sys.executable, Path(__file__).with_name("policy_off.py"), model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    pairs = json.loads(done.stdout.splitlines()[-1])
    ratios = [with_plugin / alone for alone, with_plugin in pairs]
    low, high = median_interval(ratios)
    with capsys.disabled():
        print(f"\nno policy, batch 8, {len(pairs)} pairs of turns: time per step with the plugin, ")
        print(f"of vLLM alone: {statistics.median(ratios):.4f} (95 %: {low:.4f}..{high:.4f})")
