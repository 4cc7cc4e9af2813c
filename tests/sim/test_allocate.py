"""Budgets by layer: the best split of concave curves, files that a mix reads, and the command."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpolicy
from fixtures.models import random_llama, random_prompt
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy.cli import main
from kvpolicy_hf import PolicyCache
from kvpolicy_sim.allocate import allocate, spread
from kvpolicy_vllm.config import check_policy

SHAPE = Shape(tokens=160, layers=(0, 1, 2, 3))
SPEC = "h2o:budget=32,recent=0.25"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random trace of all layers."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, random_layers(SHAPE), header=header_of(SHAPE))


def test_slots_go_where_they_add_most():
    """Against every split on a grid: none keeps more in all, whatever the (concave) curves."""
    budgets = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    draw = np.random.default_rng(0)
    for _ in range(20):
        gains = -np.sort(-draw.random((5, 3)), axis=0)  # falling: concave
        masses = gains.cumsum(axis=0)
        found = spread(budgets, masses, total=9.0)
        assert found.sum() == pytest.approx(9.0)
        reached = sum(np.interp(found[i], budgets, masses[:, i]) for i in range(3))
        best = max(
            sum(masses[b - 1, i] for i, b in enumerate(split))
            for split in itertools.product(range(1, 6), repeat=3)
            if sum(split) == 9
        )
        assert reached == pytest.approx(best)


def test_a_dent_in_a_curve_is_bridged():
    """A curve that first rises slowly and then fast is taken by its hull, not by its first step."""
    budgets = np.array([1.0, 2.0, 3.0])
    masses = np.array([[0.0, 0.0], [0.1, 0.4], [1.0, 0.5]])
    assert spread(budgets, masses, total=4.0).tolist() == [3.0, 1.0]


def test_a_mix_reads_what_was_allocated(path, tmp_path):
    """The file's shares become budgets, rounded down, whose sum is no more than before."""
    out = tmp_path / "b.safetensors"
    made = allocate(path, SPEC, out, threads=1)
    assert str(made.policy) == f"mix:layers=(0-:h2o:recent=0.25),budgets={out},budget=32"
    shares = load_file(out)["share"]
    budgets = [made.policy.of_layer(layer).budget for layer in range(len(shares))]
    assert budgets == [int(32 * share) for share in shares.tolist()]
    assert budgets == [layer.budget for layer in made.layers]
    assert sum(budgets) <= 32 * len(shares)
    assert made.after >= made.before - 0.01  # on the very trace that it was made from


def test_a_pyramid_falls_evenly(path, tmp_path):
    """--by pyramid: equal steps, a twentieth of the budget at the top, 1 on average."""
    made = allocate(path, "window:budget=400", tmp_path / "b.safetensors", by="pyramid")
    shares = load_file(tmp_path / "b.safetensors")["share"]
    assert shares.mean().item() == pytest.approx(1.0)
    assert shares[-1].item() == pytest.approx(0.05)
    assert shares.diff().tolist() == pytest.approx([(0.05 - 1.95) / 3] * 3)
    assert made.layers[0].budget > made.layers[-1].budget


def test_transformers_holds_what_was_allocated(tmp_path):
    """Each layer has storage of its own there: it holds its budget, the ledger tells the mean."""
    save_file({"share": torch.tensor([1.5, 1.0, 1.0, 0.5])}, tmp_path / "b.safetensors")
    model = random_llama()
    spec = f"mix:layers=(0-:h2o),budget=16,interval=1,budgets={tmp_path / 'b.safetensors'}"
    past = PolicyCache(model, spec)
    with torch.inference_mode():
        model(torch.tensor([random_prompt(model, 40, 0)]), past_key_values=past)
    counts = [past.retained_positions(layer).shape[-1] for layer in range(4)]
    assert counts == [24, 16, 16, 8]
    assert past.ledger().retained == 16


def test_vllm_refuses_unequal_budgets(tmp_path):
    """Layers that share a block table cannot hold unequally many slots."""
    save_file({"share": torch.tensor([1.5, 0.5])}, tmp_path / "b.safetensors")
    policy = kvpolicy.parse(f"mix:layers=(0-:h2o),budget=16,budgets={tmp_path / 'b.safetensors'}")
    with pytest.raises(UnsupportedError, match="hold different numbers of slots"):
        check_policy(policy)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"shares": torch.ones(2)}, "expected a tensor 'share'"),
        ({"share": torch.ones(2, 2)}, "expected a tensor 'share'"),
        ({"share": torch.empty(0)}, "expected a tensor 'share'"),
        ({"share": torch.tensor([2.0, 0.0])}, "of positive numbers"),
        ({"share": torch.tensor([2.0, 1.0])}, "must be 1 on average, got 1.5"),
        ({"share": torch.tensor([float("nan"), 1.0])}, "finite floats"),
    ],
)
def test_what_is_no_file_of_budgets_is_refused(tensors, told, tmp_path):
    """Other tensors, other shapes and other means are errors that say what was expected."""
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(PolicyError) as caught:
        kvpolicy.parse(f"mix:layers=(0-:h2o),budget=16,budgets={tmp_path / 'b.safetensors'}")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mix:layers=(0-:h2o:budget=8),budgets=b.safetensors", "are shares of a budget"),
        ("mix:layers=(0-:h2o),budget=16,budgets=no/such/file", "cannot read parameters"),
    ],
)
def test_budgets_need_a_budget_and_a_file(spec, told):
    """A share of nothing, and a file that is not there, are refused when the policy is made."""
    with pytest.raises(PolicyError) as caught:
        kvpolicy.parse(spec)
    assert told in str(caught.value)


def test_a_deeper_model_is_refused(tmp_path):
    """A file of two layers says nothing of a third."""
    save_file({"share": torch.ones(2)}, tmp_path / "b.safetensors")
    policy = kvpolicy.parse(f"mix:layers=(0-:h2o),budget=16,budgets={tmp_path / 'b.safetensors'}")
    with pytest.raises(PolicyError, match="has budgets of 2 layers, and this model has a layer 2"):
        policy.of_layer(2)


def test_the_command_prints_budgets_and_the_policy_to_use(path, tmp_path, capsys):
    """One line per layer, the means, and a spec that a replay accepts; the JSON has the same."""
    out = tmp_path / "b.safetensors"
    arguments = ["allocate", str(path), "--policy", SPEC, "--out", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "with equal budgets" in text
    spec = f"mix:layers=(0-:h2o:recent=0.25),budgets={out},budget=32"
    assert spec in text.replace("\n", "")
    assert main([*arguments, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["policy"] == spec
    assert [layer["layer"] for layer in result["layers"]] == list(range(len(result["layers"])))
    assert main(["replay", str(path), "--policy", spec]) == 0


@pytest.mark.parametrize(
    ("policy", "told"), [("full", "no budget"), ("bswa:block=8,segments=2", "no budget")]
)
def test_policies_without_a_budget_have_nothing_to_share(path, policy, told, tmp_path):
    """Refused before anything is replayed or written."""
    with pytest.raises(PolicyError, match=told):
        allocate(path, policy, tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_budgets_are_for_all_layers_of_a_model(tmp_path):
    """A trace of some layers says nothing of the others: refused, with how to capture."""
    shape = Shape(tokens=40, layers=(0, 2))
    path = write_trace(tmp_path / "t.kvtrace", random_layers(shape), header=header_of(shape))
    with pytest.raises(UnsupportedError, match=r"has 2 of 3 layers.*capture without --layers"):
        allocate(path, "h2o:budget=16", tmp_path / "b.safetensors")
