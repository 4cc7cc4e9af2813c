"""A policy of one class and one method runs here by its import path."""

from pathlib import Path

import pytest
import torch

from fixtures.caches import small_llama
from fixtures.models import random_prompt
from kvpolicy import PolicyError
from kvpolicy_hf import PolicyCache

SOURCE = '''
import kvpolicy


class LastRow(kvpolicy.ScorePolicy):
    """TOVA per head, as a stranger would write it."""

    name = "last_row"
    needs = ("last_row",)

    def score(self, view):
        return view.weights


class ByValue(kvpolicy.ScorePolicy):
    """Keep large values, and see keys, values, budget and layer."""

    name = "by_value"
    needs = ("keys", "values")

    def score(self, view):
        assert view.weights is None and view.budget == 16 and view.layer in (0, 1)
        return view.values.norm(dim=-1) / view.keys.norm(dim=-1)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module of policies where Python finds it."""
    (tmp_path / "strangers_policies.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "strangers_policies"


@torch.no_grad()
def retained(spec: str, chunks: tuple[int, ...] = (50,)) -> list[list[list[int]]]:
    """Feed a prompt in chunks; what every layer holds."""
    past = PolicyCache(small_llama(), spec)
    for chunk in torch.tensor([random_prompt(small_llama(), sum(chunks), 0)]).split(chunks, dim=1):
        small_llama()(chunk, past_key_values=past)
    assert past.ledger().policy == spec
    return [past.retained_positions(layer).tolist() for layer in range(2)]


def test_a_short_policy_by_import_path_does_what_it_says(module: str) -> None:
    """Proves one `score` method is enough: TOVA rewritten keeps what TOVA keeps."""
    assert len(SOURCE.splitlines()) <= 30
    custom = retained(f"{module}.LastRow:budget=16,interval=4")
    assert custom == retained("tova:budget=16,interval=4,scope=head")


def test_a_policy_over_keys_and_values_does_not_see_chunks(module: str) -> None:
    """Proves keys and values are shown, and attention only if asked for, in any chunking."""
    spec = f"{module}.ByValue:budget=16,recent=4"
    assert retained(spec) == retained(spec, (1,) * 50) == retained(spec, (7, 20, 1, 22))


def test_a_policy_with_its_own_observe_does_not_see_chunks() -> None:
    """Proves a statistic of the author's own is kept token by token."""
    spec = "fixtures.policies.FadingMaximum:budget=16,interval=4"
    assert retained(spec) == retained(spec, (1,) * 50) == retained(spec, (13, 37))


def test_what_cannot_be_imported_is_said(module: str) -> None:
    """Proves a wrong path is a clear error."""
    with pytest.raises(PolicyError, match="cannot import policy"):
        PolicyCache(small_llama(), f"{module}.Missing:budget=16")
