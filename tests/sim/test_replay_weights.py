"""fam:level=model is replayed with the traced model's own layers, and with no others."""

import numpy as np
import pytest
import torch

import kvpolicy_sim
from fixtures.models import SMALL_SHAPE, random_gemma, random_llama, random_qwen3
from fixtures.replays import full_attention, relative_error
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import UnsupportedError, parse
from kvpolicy.trace import Trace
from oracles.dense import parse as read_spec
from oracles.dense import replay_layer
from oracles.feedback import first_rows
from oracles.llama import read_decoder, to_float64
from oracles.memory import Given

SPECS = (
    "fam:block=8,segments=1,slots=4,level=model",
    "fam:block=5,segments=2,slots=7,sinks=3,level=model,query=previous",
    "fam:block=90,segments=0,slots=3,level=model",
)
TOKENS = 100

MODELS = {
    "llama": lambda: random_llama(**SMALL_SHAPE),
    "qwen3": random_qwen3,
    "gemma": random_gemma,
}


@pytest.fixture(scope="module", params=MODELS)
def traced(request, tmp_path_factory):
    """A model, its folder, and a trace of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param]().eval()
    model.save_pretrained(folder / "model")
    ids = torch.randint(0, 200, (TOKENS,), generator=torch.Generator().manual_seed(0))
    kvpolicy_sim.capture(model, ids, folder / "t.kvtrace")
    return model, folder / "model", folder / "t.kvtrace"


def given_by(model, spec):
    """What the oracle's memory is given in every layer."""
    config, stack = model.config, model.get_decoder()
    scale = config.hidden_size**0.5 if config.model_type == "gemma" else 1.0
    row = to_float64(stack.embed_tokens.weight).mean(axis=0) * scale
    decoders = [read_decoder(module, config) for module in stack.layers]
    rows = first_rows(decoders, row, read_spec(spec), config.rope_parameters["rope_theta"])
    return [Given({}, decoder, row) for decoder, row in zip(decoders, rows, strict=True)]


@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_the_model_follow_the_oracle(spec, traced):
    """Outputs in every layer are those of algorithm 2 over that layer's queries, keys, values."""
    model, folder, path = traced
    report = kvpolicy_sim.replay(path, [spec], model=folder)
    theta = model.config.rope_parameters["rope_theta"]
    with Trace.open(path) as trace:
        for layer, given in enumerate(given_by(model, spec)):
            q, k, v = (trace.read(kind, layer, 0, dtype=torch.float32) for kind in "qkv")
            run = replay_layer(spec, q, k, v, layer=layer, rotated_by=theta, given=given)
            ideal = full_attention(type("X", (), {"q": q, "k": k, "v": v}))[1]
            got = report.result(spec).outcomes[0, layer].output_error
            np.testing.assert_allclose(
                got, relative_error(run.outputs, ideal), rtol=1e-3, atol=1e-4
            )


def test_hidden_rows_are_counted_in_bytes(traced):
    """Beside its slots, a layer holds F rows as wide as the model."""
    model, folder, path = traced
    spec = SPECS[0]
    report = kvpolicy_sim.replay(path, [spec, spec.replace(",level=model", "")], model=folder)
    with_rows, without = (result["bytes_kept"] for result in report.as_dict()["results"])
    config = model.config
    assert with_rows - without == config.num_hidden_layers * 4 * config.hidden_size * 4
    assert 0 < report.result(spec).memory_share < 1


def test_a_loaded_model_serves_as_well_as_its_folder(traced):
    """Weights may be given as a path, as a model, or taken apart once for several replays."""
    model, folder, path = traced
    with Trace.open(path) as trace:
        loaded = kvpolicy_sim.weights.load_weights(folder, trace.header)
    reports = [kvpolicy_sim.replay(path, SPECS[0], model=x) for x in (folder, model, loaded)]
    errors = [report.result(SPECS[0]).output_error for report in reports]
    assert errors[0] == errors[1] == errors[2]


def test_another_model_is_refused(traced, tmp_path):
    """A model of other sizes, or of another configuration, is not the traced one."""
    _, _, path = traced
    other = random_llama(**SMALL_SHAPE | {"num_hidden_layers": 3})
    with pytest.raises(UnsupportedError, match="give the traced model"):
        kvpolicy_sim.replay(path, SPECS[0], model=other)
    shape = Shape(tokens=20, head_dim=32)
    changes = {"num_query_heads": 4, "fingerprint": "0" * 64}
    header = header_of(shape, **changes)
    foreign = write_trace(tmp_path / "t.kvtrace", random_layers(shape), header=header)
    with pytest.raises(UnsupportedError, match="fingerprints differ"):
        kvpolicy_sim.replay(foreign, SPECS[0], model=random_llama(**SMALL_SHAPE))


def test_missing_weights_are_refused_with_what_to_do(traced, tmp_path, monkeypatch):
    """Without a model, with an empty folder, or without transformers, the reason is given."""
    _, folder, path = traced
    with pytest.raises(UnsupportedError, match="--weights"):
        kvpolicy_sim.replay(path, SPECS[0])
    with pytest.raises(UnsupportedError, match="cannot load a model"):
        kvpolicy_sim.replay(path, SPECS[0], model=tmp_path)
    monkeypatch.setattr("kvpolicy.extras.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="install the extra hf"):
        kvpolicy_sim.replay(path, SPECS[0], model=folder)


def test_weights_that_nobody_needs_are_not_loaded(traced, tmp_path):
    """A folder without a model does no harm to policies that look at the trace alone."""
    _, _, path = traced
    spec = "fam:block=8,segments=1,slots=4"
    assert not parse(spec).needs_decoder
    report = kvpolicy_sim.replay(path, spec, model=tmp_path)
    assert report.result(spec).memory_share > 0
