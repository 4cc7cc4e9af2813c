"""Memories at the edge of numbers, files and specs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import kvpolicy
from fixtures.faults import FaultyDigest
from kvpolicy import PolicyError
from kvpolicy.memory.linear import LinearMemory, calibrated_log_mass, features, observe_mass
from kvpolicy.memory.parameters import load_parameters
from kvpolicy.memory.state import Shape
from kvpolicy.policies.compressive import Compressive
from kvpolicy.rehearsal import Case, Row, by_chunks, by_steps


def test_features_of_very_negative_numbers_stay_positive_and_exact() -> None:
    """Proves ELU + 1 is exp(x) below zero; taken literally it is 0 from -17 on in float32."""
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 2.0])
    expected = torch.tensor([-80.0, -20.0, -1.0, 0.0]).double().exp()
    torch.testing.assert_close(features(x)[:4].double(), expected, rtol=1e-6, atol=0.0)
    assert features(x)[4] == 3.0


def test_segment_without_mass_does_not_spoil_the_calibration() -> None:
    """Proves a query whose features vanish on a whole segment leaves finite statistics behind."""
    shape = Shape(1, 1, 1, 4, 4, torch.float32, torch.device("cpu"))
    fits = LinearMemory.empty(shape).fits
    for mass in (0.0, 5.0, 7.0):
        fits = observe_mass(fits, torch.full((1, 1, 1), mass), torch.zeros(1, 1, 1))
    assert fits.isfinite().all()
    assert calibrated_log_mass(fits, torch.full((1, 1, 1, 1), 6.0)).isfinite().all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2).to(torch.float8_e4m3fn),
        torch.zeros(2, 2).to(torch.float8_e5m2),
        torch.full((2, 2), 1e300, dtype=torch.float64),
    ],
    ids=["float8_e4m3fn", "float8_e5m2", "beyond float32"],
)
def test_parameters_that_float32_does_not_hold_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    """Proves neither floats without arithmetic nor numbers that overflow get through."""
    path = tmp_path / "gates.safetensors"
    save_file({"beta": tensor}, path)
    with pytest.raises(PolicyError, match="tensor 'beta' must hold finite floats"):
        load_parameters(str(path))


def test_pipes_and_folders_are_no_parameter_files(tmp_path: Path) -> None:
    """Proves a path that would block when opened is refused at once."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(PolicyError, match="no such regular file"):
            load_parameters(str(path))


@pytest.mark.parametrize("name", ["a,b", "a(b", " a", "(a))"])
def test_text_that_no_spec_can_say_is_refused(name: str) -> None:
    """Proves a policy's canonical spec always reads back as the policy."""
    with pytest.raises(PolicyError, match="which no spec can say"):
        Compressive(budget=8, fn="conv", weights=f"{name}.safetensors")


def test_text_in_balanced_parentheses_survives_the_spec() -> None:
    """Proves commas and colons inside parentheses are literal, as the grammar has it."""
    policy = Compressive(budget=8, fn="conv", weights="run(a,b:c)=1.safetensors")
    assert kvpolicy.parse(str(policy)) == policy


def test_budget_that_blocks_multiply_to_is_moderate() -> None:
    """Proves sizes that are moderate one by one may not make a budget beyond int64."""
    with pytest.raises(PolicyError, match="budget comes to"):
        kvpolicy.parse(f"bswa:block={1 << 40},segments={1 << 40}")


class Forgetful(kvpolicy.SlotMemoryPolicy):
    """A memory whose author forgot `absorb`."""

    name = "forgetful"

    @property
    def occupancy(self) -> kvpolicy.Occupancy:
        """Two memory slots."""
        return kvpolicy.Occupancy(self.budget - 2, self.interval or 1, 2)


def test_a_missing_method_is_named() -> None:
    """Proves that a memory policy without absorb() says so at its first eviction."""
    case = Case(lengths=(12, 12))
    with pytest.raises(PolicyError, match=r"defines no absorb\(memory, passage\)"):
        by_steps(Forgetful(budget=6), case)


@pytest.mark.parametrize("run", [by_steps, by_chunks])
@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("absorb_nan", r"absorb\(\) returned NaN"),
        ("absorb_shape", r"absorb\(\) must return a SlotMemory with tensors of shapes"),
        ("absorb_type", "NoneType"),
        ("attend_nan", r"attend\(\) returned NaN"),
        ("attend_shape", r"attend\(\) must return `output`"),
    ],
)
def test_what_a_memory_returns_is_held_to_its_form(run: Any, how: str, word: str) -> None:
    """Proves wrong shapes, types and NaN are refused in steps and in look-ahead, by name."""
    with pytest.raises(PolicyError, match=word):
        run(FaultyDigest(budget=8, how=how), Case(lengths=(12, 12)))


def test_a_row_that_is_no_number_does_not_fail_its_batch() -> None:
    """Proves a row whose own values are infinite is excused, and the other row unharmed."""
    policy, case = kvpolicy.parse("centroid:budget=8"), Case(lengths=(20, 20))
    expected = by_chunks(policy, case)
    clean = Case._row

    def infinite(self: Case, index: int, length: int) -> Row:
        row = clean(self, index, length)
        return row if index else Row(row.q, row.k, row.v * torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "_row", infinite)
        found = by_chunks(policy, case)
    assert torch.equal(found.outputs[1], expected.outputs[1])
    assert not bool(found.outputs[0].isfinite().all())
