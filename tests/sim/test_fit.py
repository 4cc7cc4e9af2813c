"""Fitted kernels and gates: better on tokens that were held out, and read back by policies."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpolicy_sim
from fixtures.replays import full_attention
from fixtures.traces import LayerTensors, Shape, header_of, random_layers, write_trace
from kvpolicy import PolicyError, TraceError, UnsupportedError
from kvpolicy.memory.parameters import load_parameters
from kvpolicy_sim.fit_kernels import averages
from oracles.arithmetic import rotate
from oracles.memory import elu_plus_one

SHAPE = Shape(tokens=600, layers=(0, 2))
THETA = 10_000.0
CONV = "compressive:budget=48,fn=conv"


def structured_layers(shape, seed=0):
    """Texts in which the last token of every three carries the group's key and value.

    The others are noise, so that a kernel which looks at the last one alone loses little.
    """
    generator = np.random.default_rng(seed)
    heads = shape.kv_heads * shape.group
    places = np.arange(shape.tokens)

    def rotated(x):
        return torch.from_numpy(rotate(x, places, THETA)).float()

    layers = {}
    for layer in shape.layers:
        sizes = shape.kv_heads, shape.tokens, shape.head_dim
        loud = np.where(places % 3 == 2, 1.0, 0.1)[:, None]
        k, v = (generator.standard_normal(sizes) * loud for _ in range(2))
        q = generator.standard_normal((heads, shape.tokens, shape.head_dim)) * 2
        layers[layer] = LayerTensors(rotated(q), rotated(k), torch.from_numpy(v).float())
    return layers


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A structured trace of two sequences, whose model has four layers."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    header = header_of(SHAPE, num_layers=4)
    return write_trace(path, *(structured_layers(SHAPE, s) for s in (0, 1)), header=header)


@pytest.fixture(scope="module")
def kernels(path, tmp_path_factory):
    """Kernels fitted to it."""
    out = tmp_path_factory.mktemp("fitted") / "k.safetensors"
    return kvpolicy_sim.fit(path, CONV, out)


@pytest.fixture(scope="module")
def gates(path, tmp_path_factory):
    """Gates fitted to it."""
    out = tmp_path_factory.mktemp("fitted") / "g.safetensors"
    return kvpolicy_sim.fit(path, "infini:segment=64", out)


def test_kernels_are_better_on_tokens_that_were_held_out(kernels):
    """In every layer the fit lowers the reconstruction loss, by far where averages blur."""
    assert [made.layer for made in kernels.layers] == [0, 2]
    for made in kernels.layers:
        assert made.fitted.after < 0.8 * made.fitted.before
        assert made.held_out.after < 0.9 * made.held_out.before


def test_kernels_cover_the_model_and_are_read_back(kernels, path):
    """Layers that were not captured average; the policy named reads its own layers."""
    tensors = load_file(kernels.path)
    mean = averages(2, 3, 16)
    for name, expected in zip(("keys", "values"), mean, strict=True):
        assert tensors[name].shape == (4, 2, 3, 16, 16)
        assert tensors[name][1].equal(expected)
        assert tensors[name][3].equal(expected)
        assert not tensors[name][0].allclose(expected)
    report = kvpolicy_sim.replay(path, [kernels.policy])
    assert report.result(kernels.policy).memory_share > 0


def test_kernels_of_averages_are_the_mean(path, tmp_path):
    """A file of averages replays as fn=mean does."""
    file = tmp_path / "mean.safetensors"
    mean = averages(2, 3, 16)
    whole = {
        name: x.expand(4, -1, -1, -1, -1).clone()
        for name, x in zip(("keys", "values"), mean, strict=True)
    }
    save_file(whole, file)
    specs = ["compressive:budget=48", f"{CONV},weights={file}"]
    report = kvpolicy_sim.replay(path, specs)
    for place, ours in report.result(specs[0]).outcomes.items():
        theirs = report.result(specs[1]).outcomes[place]
        np.testing.assert_allclose(ours.output_error, theirs.output_error, rtol=1e-4, atol=1e-6)


def test_the_reported_loss_is_that_of_the_definition(tmp_path):
    """On one passage the loss before is content-based attention over averages, by hand."""
    shape = Shape(tokens=150, layers=(0,), kv_heads=1, group=1, head_dim=8)
    x = structured_layers(shape)[0]
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    fitted = kvpolicy_sim.fit(
        path, "compressive:budget=24,fn=conv", tmp_path / "k.safetensors", steps=1
    )
    # Slots hold 36 tokens, but a part of 30 has room for 12 and their queries.
    q, k = (rotate(y[0].double().numpy(), -np.arange(150), THETA) for y in (x.q, x.k))
    v = x.v[0].double().numpy()
    errors, norms = [], []
    for begin in range(120, 150 - 24 + 1, 6):
        part, asking = slice(begin, begin + 12), slice(begin + 12, begin + 24)
        pooled_k, pooled_v = (y[part].reshape(4, 3, 8).mean(axis=1) for y in (k, v))
        whole = attend(q[asking], k[part], v[part])
        errors.append(((attend(q[asking], pooled_k, pooled_v) - whole) ** 2).sum())
        norms.append((whole**2).sum())
    assert fitted.layers[0].held_out.before == pytest.approx(sum(errors) / sum(norms), rel=1e-4)


def attend(q, k, v):
    """Content-based attention."""
    logits = q @ k.T / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def test_gates_minimise_the_error_of_outputs(gates, path):
    """No other gate of a head has a smaller squared error, and the loss is the replay's."""
    beta = load_file(gates.path)["beta"]
    assert beta.shape == (4, 4)
    assert beta[1].equal(torch.full((4,), -16.0))
    errors = {}
    for shift in (-0.1, 0.0, 0.1):
        errors[shift] = squared_errors(path, beta.sigmoid() + shift)
    assert (errors[0.0] <= errors[-0.1]).all()
    assert (errors[0.0] <= errors[0.1]).all()
    for made in gates.layers:
        assert made.fitted.after < made.fitted.before


def squared_errors(path, gates):
    """Squared error of both layers' heads under some gates, summed over tokens; [2, H]."""
    found = np.zeros((2, 4))
    for seed in (0, 1):
        for row, (layer, x) in enumerate(structured_layers(SHAPE, seed).items()):
            ideal = full_attention(x)[1]
            for head in range(4):
                local, recalled = infini_parts(x, head, 64)
                share = float(gates[layer, head])
                mixed = share * recalled + (1 - share) * local
                found[row, head] += ((mixed - ideal[head])[64:] ** 2).sum()
    return found


def infini_parts(x, head, segment):
    """Attention inside segments, and what linear memory recalls, of one query head; [T, D]."""
    q, k = x.q[head].double().numpy(), x.k[head // 2].double().numpy()
    v = x.v[head // 2].double().numpy()
    places = np.arange(len(k))
    kernel_q, kernel_k = (elu_plus_one(rotate(y, -places, THETA)) for y in (q, k))
    local, recalled = np.zeros_like(v), np.zeros_like(v)
    for t in range(len(k)):
        first = t // segment * segment
        local[t] = attend(q[t : t + 1], k[first : t + 1], v[first : t + 1])[0]
        if first:
            weights = kernel_k[:first] @ kernel_q[t]
            recalled[t] = weights @ v[:first] / weights.sum()
    return local, recalled


def test_gates_are_judged_on_a_segment_that_they_were_not_fitted_to(tmp_path):
    """Where no segment begins in the last quarter, the last one is held out all the same."""
    shape = Shape(tokens=270, layers=(0,))
    layers = [random_layers(shape, seed=seed)[0] for seed in range(2)]
    changed = LayerTensors(
        layers[0].q, layers[0].k, torch.cat([layers[0].v[:, :200], layers[1].v[:, 200:]], dim=1)
    )
    fits = [
        kvpolicy_sim.fit(
            write_trace(tmp_path / f"{index}.kvtrace", {0: layer}, header=header_of(shape)),
            "infini:segment=100",
            tmp_path / "g.safetensors",
        ).layers[0]
        for index, layer in enumerate((layers[0], changed))
    ]
    for made in fits:
        assert made.held_out != made.fitted
    assert fits[0].held_out != fits[1].held_out


def test_a_fitted_gate_is_better_than_a_closed_one_in_a_replay(gates, path):
    """The policy named by the fit has less error than attention inside segments."""
    closed = "infini:segment=64"
    report = kvpolicy_sim.replay(path, [closed, gates.policy])
    ours, theirs = (report.result(p).output_error["mean"] for p in (gates.policy, closed))
    assert ours < theirs


@pytest.mark.parametrize("spec", [CONV, "infini:segment=64,update=delta"])
def test_a_fit_is_reproducible(spec, path, tmp_path):
    """Threads and torch's own change nothing: the same bytes, and the caller's settings stay."""
    before = torch.get_num_threads()
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file, threads in zip(files, (1, 2), strict=True):
        kvpolicy_sim.fit(path, spec, file, steps=10, threads=threads)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.get_num_threads() == before


def test_a_new_fit_is_read_where_an_old_one_stood(path, tmp_path):
    """Parameters are cached by path, and a fit to the same file empties that cache."""
    file = tmp_path / "k.safetensors"
    kvpolicy_sim.fit(path, CONV, file, steps=1, layers=[0])
    first = load_parameters(str(file))["values"]
    kvpolicy_sim.fit(path, CONV, file, steps=20, layers=[0])
    assert not load_parameters(str(file))["values"].equal(first)
    assert not list(tmp_path.glob("*.part"))


def test_heads_that_were_not_captured_stay_as_they_were(tmp_path):
    """Kernels and gates of a trace of one KV head leave the others at averages, and closed."""
    shape = Shape(tokens=300, layers=(0,))
    x = structured_layers(shape)[0]
    part = LayerTensors(x.q[2:], x.k[1:], x.v[1:])
    path = write_trace(tmp_path / "t.kvtrace", {0: part}, header=header_of(shape, kv_heads=(1,)))
    kernels = kvpolicy_sim.fit(path, CONV, tmp_path / "k.safetensors")
    gates = kvpolicy_sim.fit(path, "infini:segment=32", tmp_path / "g.safetensors")
    keys, beta = load_file(kernels.path)["keys"], load_file(gates.path)["beta"]
    assert keys[0, 0].equal(averages(1, 3, 16).keys[0])
    assert not keys[0, 1].equal(averages(1, 3, 16).keys[0])
    assert beta[0, :2].eq(-16).all()
    assert beta[0, 2:].gt(-16).any()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("window:budget=32", "nothing to fit"),
        ("compressive:budget=48", "nothing to fit"),
        ("compressive:budget=8,memory=1,fn=conv", "at least two slots"),
        ("infini:segment=600", "no query follows"),
        ("infini:segment=300", "capture more than 600 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused(spec, reason, path, tmp_path):
    """Policies without parameters and traces that are too short are named, nothing is written."""
    with pytest.raises((PolicyError, UnsupportedError), match=reason):
        kvpolicy_sim.fit(path, spec, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_traces_and_names_that_do_not_do_are_refused(tmp_path):
    """Sampled queries, unknown rotations, and file names that no spec can hold."""
    shape = Shape(tokens=300, layers=(0,))
    for index, (changes, reason) in enumerate(
        (({"query_stride": 2}, "query_stride=1"), ({"rope": None}, "before their rotation"))
    ):
        path = tmp_path / f"{index}.kvtrace"
        write_trace(path, random_layers(shape), header=header_of(shape, **changes))
        with pytest.raises(UnsupportedError, match=reason):
            kvpolicy_sim.fit(path, CONV, tmp_path / "x.safetensors")
    with pytest.raises(PolicyError, match="which no spec can say"):
        kvpolicy_sim.fit(path, CONV, tmp_path / "a,b")


def test_files_that_cannot_be_written_are_refused_before_the_fit(path, tmp_path):
    """A folder that is not there, or a folder in the file's place."""
    (tmp_path / "x.safetensors").mkdir()
    for out in (tmp_path / "none" / "y.safetensors", tmp_path / "x.safetensors"):
        with pytest.raises(PolicyError, match="in a folder that exists"):
            kvpolicy_sim.fit(path, CONV, out)


@pytest.mark.parametrize("spec", [CONV, "infini:segment=64"])
def test_numbers_that_are_not_finite_are_refused(spec, tmp_path):
    """One NaN fails the fit of kernels and of gates, and nothing is written."""
    shape = Shape(tokens=300, layers=(0,))
    x = random_layers(shape)[0]
    x.v[:, 290] = math.nan
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    with pytest.raises(TraceError, match=r"v of layer 0, sequence 0 .* not finite"):
        kvpolicy_sim.fit(path, spec, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_is_not_there_is_named_once(tmp_path):
    """The error says the path once, and why."""
    path = str(tmp_path / "x.safetensors")
    with pytest.raises(PolicyError) as caught:
        load_parameters(path)
    assert str(caught.value) == f"{path}: cannot read parameters: there is no such regular file"
