"""Specs, refusals, parameter files, figures and ledgers of blocks and memories."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import kvpolicy
from kvpolicy import Occupancy, PolicyError, UnsupportedError
from kvpolicy.attention import AttentionLayer
from kvpolicy.footprint import floats_beside
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.rehearsal import HEAD_DIM, Case, Host
from kvpolicy.rotary import Rotary
from oracles.specs import parse, token_slots
from strategies import feedback_specs, memory_specs

# --- specs ------------------------------------------------------------------------------------

CANONICAL = [
    ("bswa:segments=2,block=4", "bswa:block=4,segments=2"),
    ("bswa:block=4,segments=2,sinks=0", "bswa:block=4,segments=2"),
    ("compressive:budget=100", "compressive:budget=100"),
    ("compressive:budget=100,interval=6", "compressive:budget=100"),
    ("compressive:budget=100,interval=4", "compressive:budget=100"),
    ("compressive:budget=100,interval=7", "compressive:budget=100,interval=9"),
    ("compressive:budget=100,interval=7,rate=4", "compressive:budget=100,rate=4"),
    ("compressive:budget=64,fn=max,bias=none", "compressive:budget=64,bias=none,fn=max"),
    ("compressive:budget=64,memory=0.5,min_similarity=-1", "compressive:budget=64"),
    ("centroid:budget=64,slots=0.25", "centroid:budget=64"),
    ("centroid:budget=64,slots=16", "centroid:budget=64,slots=16"),
    ("fam:block=4,segments=2", "fam:block=4,segments=2"),
    ("fam:block=4,segments=2,interval=4", "fam:block=4,segments=2"),
    ("fam:block=4,budget=11,slots=3", "fam:block=4,segments=2,slots=3"),
    ("fam:block=4,budget=13,slots=3,sinks=2", "fam:block=4,segments=2,slots=3,sinks=2"),
    ("fam:block=4,segments=0,budget=64", "fam:block=4,segments=0"),
    ("infini:segment=4,gate=closed", "infini:segment=4"),
    ("infini:segment=4,gate=0.5", "infini:segment=4,gate=0.5"),
    ("infini:segment=4,gate=.5", "infini:segment=4,gate=0.5"),
    ("infini:segment=4,gate=calibrated,update=linear", "infini:segment=4,gate=calibrated"),
    ("infini:segment=4,gate=a/b.safetensors", "infini:segment=4,gate=a/b.safetensors"),
]


@pytest.mark.parametrize(("spec", "canonical"), CANONICAL)
def test_specs_have_one_canonical_form(spec: str, canonical: str) -> None:
    """Proves what is left out, what is rounded, and that printing and parsing agree."""
    policy = kvpolicy.parse(spec)
    again = kvpolicy.parse(str(policy))
    assert sorted(str(policy).split(":")[1].split(",")) == sorted(
        canonical.split(":")[1].split(",")
    )
    assert again == policy
    assert str(again) == str(policy)
    assert again.occupancy == policy.occupancy


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ("bswa:block=4,segments=2", Occupancy(8, 4)),
        ("bswa:block=4,segments=0,sinks=3", Occupancy(3, 4)),
        ("compressive:budget=100", Occupancy(50, 6, 50)),
        ("compressive:budget=99,memory=0.25,sinks=2", Occupancy(75, 6, 24)),
        ("compressive:budget=9,memory=5,rate=4", Occupancy(4, 4, 5)),
        ("compressive:budget=9,memory=0", Occupancy(9, 3)),
        ("centroid:budget=99", Occupancy(75, 6, 24)),
        ("centroid:budget=9,slots=0", Occupancy(9, 1)),
        ("fam:block=4,segments=2,slots=3,sinks=1", Occupancy(9, 4, 3)),
        ("fam:block=4,segments=2,slots=3,level=model", Occupancy(8, 4, 3)),
        ("infini:segment=7", Occupancy(0, 7)),
        ("infini:segment=7,gate=0.5", Occupancy(0, 7)),
    ],
)
def test_occupancy_is_that_of_the_contract(spec: str, law: Occupancy) -> None:
    """Proves tokens kept, interval and reserved slots of every family."""
    assert kvpolicy.parse(spec).occupancy == law


@given(spec=st.one_of(memory_specs(), feedback_specs()), tokens=st.integers(0, 100))
@settings(max_examples=60)
def test_occupancy_is_the_oracles(spec: str, tokens: int) -> None:
    """Proves the law for drawn specs against the definition's own reading of them."""
    law, definition = kvpolicy.parse(spec).occupancy, parse(spec)
    assert law.held(tokens) == token_slots(tokens, definition)
    assert law.state_slots == definition.state_slots


@pytest.mark.parametrize(
    ("spec", "has_memory"),
    [
        ("compressive:budget=9,memory=0", False),
        ("compressive:budget=9,memory=1", True),
        ("centroid:budget=9,slots=0", False),
        ("centroid:budget=9,slots=0.05", False),
        ("fam:block=4,segments=1,slots=0", False),
        ("fam:block=4,segments=1,slots=0,level=model", False),
        ("fam:block=4,segments=1,slots=1,level=model", True),
        ("infini:segment=4", False),
        ("infini:segment=4,gate=0.0", False),
        ("infini:segment=4,gate=0.1", True),
        ("infini:segment=4,gate=calibrated", True),
    ],
)
def test_a_memory_without_room_is_none(spec: str, has_memory: bool) -> None:
    """Proves that hosts store nothing for a memory that would never be read."""
    policy = kvpolicy.parse(spec)
    assert isinstance(policy, MemoryPolicy)
    assert policy.has_memory == has_memory
    bare = AttentionLayer(policy, 0, 1.0)
    if has_memory:
        return
    x = torch.zeros(1, 1, HEAD_DIM)
    assert bare.new_slots(x, x, x).memory is None


REFUSED = [
    ("bswa:block=0,segments=1", "block must be at least 1.*got block=0, segments=1, sinks=0"),
    ("bswa:block=2,segments=-1", "segments and sinks must not be negative.*segments=-1"),
    ("bswa:block=2,segments=1,sinks=-1", "must not be negative.*sinks=-1"),
    ("bswa:block=2,segments=1,protect=(0:1)", "whole blocks.*drop protect, or use window"),
    ("bswa:block=2", "bswa needs segments; write bswa:segments=VALUE"),
    ("bswa:segments=2", "bswa needs block"),
    ("bswa:block=2,segments=1,budget=4", "bswa has no key 'budget'; its keys: block, segments"),
    ("bswa:block=2,segments=1,interval=2", "bswa has no key 'interval'"),
    ("bswa:block=2.5,segments=1", "bswa:block: got 2.5, expected int"),
    ("compressive:rate=3", "compressive needs budget"),
    ("compressive:budget=9,rate=0", "rate must be at least 1.*rate=0"),
    ("compressive:budget=9,sinks=-1", "sinks must not be negative.*sinks=-1"),
    ("compressive:budget=9,min_similarity=1.5", "cosine in -1..1, got 1.5"),
    ("compressive:budget=9,min_similarity=-1.5", "cosine in -1..1, got -1.5"),
    ("compressive:budget=9,fn=most-used,min_similarity=0.5", "merges nothing; drop min_sim"),
    ("compressive:budget=9,fn=attention,bias=none", "fits each slot's bias; drop bias=none"),
    ("compressive:budget=9,weights=w.safetensors", "kernels of fn=conv; got fn=mean"),
    ("compressive:budget=9,protect=(0:1)", "groups are consecutive.*drop protect, or use sinks"),
    ("compressive:budget=9,memory=1.5", "1.5 of the budget for memory must lie in 0.0..1.0"),
    ("compressive:budget=9,memory=-0.5", "must lie in 0.0..1.0; write an int"),
    ("compressive:budget=9,memory=-1", "-1 memory slots and 0 sinks leave no recent token"),
    ("compressive:budget=9,memory=9", "9 memory slots and 0 sinks leave no recent token"),
    ("compressive:budget=9,memory=5,sinks=4", "5 memory slots and 4 sinks leave no recent token"),
    ("compressive:budget=9,fn=median", "got 'median', expected mean | max"),
    ("compressive:budget=9,bias=linear", "got 'linear', expected log | none"),
    ("compressive:budget=9,rope=reindex", "rope=reindex is exact only where"),
    ("compressive:budget=0", "must be at least 1|leave no recent token"),
    ("centroid:slots=3", "centroid needs budget"),
    ("centroid:budget=9,sinks=-1", "sinks must not be negative, got -1"),
    ("centroid:budget=9,slots=9", "9 memory slots and 0 sinks leave no recent token"),
    ("centroid:budget=9,slots=-1", "-1 memory slots"),
    ("centroid:budget=9,slots=1.25", "1.25 of the budget for memory must lie in 0.0..1.0"),
    ("centroid:budget=9,slots=true", "got 'true', expected int or float"),
    ("centroid:budget=9,rope=reindex", "rope=reindex is exact only where"),
    ("fam:segments=1", "fam needs block"),
    ("fam:block=4", "fam needs segments; write fam:block=B,segments=M"),
    ("fam:block=0,segments=1", "block must be at least 1.*got block=0"),
    ("fam:block=0,budget=70", "fam needs segments|block must be at least 1"),
    ("fam:block=4,segments=-1", "must not be negative.*segments=-1"),
    ("fam:block=4,segments=1,sinks=-2", "must not be negative.*sinks=-2"),
    ("fam:block=4,segments=1,slots=-1", "slots must not be negative, got -1"),
    ("fam:block=4,segments=1,budget=9,slots=3", "make budget=7 and interval=4, got budget=9"),
    ("fam:block=4,budget=9,slots=3", "1 segments of 4 tokens.*make budget=7.*leave budget"),
    ("fam:block=4,segments=1,interval=3", "make budget=68 and interval=4.*interval=3"),
    ("fam:block=4,segments=1,level=model,bias=none", "weigh as one token each; drop bias"),
    ("fam:block=4,segments=1,query=previous", "query is for level=model; drop it"),
    ("fam:block=4,segments=1,protect=(0:1)", "whole blocks.*drop protect"),
    ("fam:block=4,segments=1,rope=reindex", "rope=reindex is exact only where"),
    ("fam:block=4,segments=1,level=tokens", "got 'tokens', expected kv | model"),
    ("infini:gate=0.5", "infini needs segment"),
    ("infini:segment=0", "segment must be at least 1, got 0"),
    ("infini:segment=4,gate=1.5", "a number in 0.0..1.0, or a file .* got 1.5"),
    ("infini:segment=4,gate=-0.5", "a number in 0.0..1.0, or a file .* got -0.5"),
    ("infini:segment=4,protect=(0:1)", "it frees whole segments; drop protect"),
    ("infini:segment=4,budget=4", "infini has no key 'budget'; its keys: segment"),
    ("infini:segment=4,interval=4", "infini has no key 'interval'"),
    ("infini:segment=4,rope=reindex", "rope=reindex is exact only where"),
    ("centroid:budget=9,protect=(1:2)", "drop protect, or use sinks"),
    ("compressive:budget=9,fn=most-used,bias=none", "drop bias=none"),
    ("infini:segment=4,gate=open", "must be closed, calibrated, .* got 'open'"),
    ("compressive:budget=9,fn=conv,weights=w.npz", "ends in .safetensors, got 'w.npz'"),
    ("infini:segment=4,update=sum", "got 'sum', expected linear | delta"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_impossible_specs_are_refused(spec: str, message: str) -> None:
    """Proves that each contradiction is named, with what was given and what to change."""
    with pytest.raises(PolicyError, match=message.replace(" | ", r" \| ")):
        kvpolicy.parse(spec)


def test_hosts_without_what_a_memory_needs_are_refused() -> None:
    """Proves that neither a missing rotation nor missing weights pass silently."""
    x = torch.zeros(1, 1, HEAD_DIM)
    memory, rows = (
        kvpolicy.parse(spec)
        for spec in ("centroid:budget=9", "fam:block=4,segments=1,level=model,slots=2")
    )
    with pytest.raises(UnsupportedError, match=r"centroid:budget=9: .*plain rotary embeddings"):
        AttentionLayer(memory, 0, 1.0).new_slots(x, x, x)
    rotary = Rotary.from_theta(1e4, HEAD_DIM)
    with pytest.raises(UnsupportedError, match="level=model: its memory needs the layer's weights"):
        AttentionLayer(rows, 0, 1.0, rotary).new_slots(x, x, x)


# --- files ------------------------------------------------------------------------------------

GATES = "infini:segment=4,gate={}"
KERNELS = "compressive:budget=9,fn=conv,weights={}"
SHAPE = Case(lengths=(12, 12), kv_heads=2, group=2, layer=1)


def start(spec: str) -> Host:
    """Begin two requests in layer 1 of a model with 2 KV heads and 4 query heads."""
    return Host(kvpolicy.parse(spec), SHAPE, SHAPE.rows())


def tensors_of(spec: str) -> dict[str, Tensor]:
    """Parameters that fit."""
    if spec == GATES:
        return {"beta": torch.zeros(2, 4)}
    shape = (2, 2, 3, HEAD_DIM, HEAD_DIM)
    return {"keys": torch.ones(shape), "values": torch.zeros(shape)}


@pytest.mark.parametrize("spec", [GATES, KERNELS])
def test_files_that_fit_are_read(spec: str, tmp_path: Path) -> None:
    """Proves that the damages below are what is refused; half precision is a float too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({name: x.to(dtype) for name, x in tensors_of(spec).items()}, path)
        host = start(spec.format(path))
        for _ in range(12):
            host.step([0, 1])
        assert host.run.outputs[0].isfinite().all()


@pytest.mark.parametrize("spec", [GATES, KERNELS])
def test_damaged_files_are_refused(spec: str, tmp_path: Path) -> None:
    """Proves that a file cut anywhere, foreign bytes or no file give PolicyError, at the start."""
    whole = tmp_path / "whole.safetensors"
    save_file(tensors_of(spec), whole)
    content = whole.read_bytes()
    damaged = {
        "pickle": pickle.dumps(tensors_of(spec)),
        "text": b"beta: 0.5\n",
        "zeros": bytes(200),
        "header": b"\xff" * 8 + content[8:],
        "json": content[:8] + b"[" + content[9:],
        **{f"cut{size}": content[:size] for size in (0, 1, 7, 8, 9, 40, len(content) - 1)},
    }
    for name, data in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(PolicyError, match=f"{name}.safetensors: cannot read parameters"):
            start(spec.format(path))
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    for missing in (tmp_path / "missing.safetensors", folder, folder / "where.safetensors"):
        with pytest.raises(PolicyError, match="cannot read parameters"):
            start(spec.format(missing))
    with pytest.raises(PolicyError, match="cannot read parameters"):
        start(spec.format("nul\0byte.safetensors"))


@pytest.mark.parametrize("spec", [GATES, KERNELS])
def test_files_too_large_are_refused_unread(spec: str, tmp_path: Path) -> None:
    """Proves that a model's weights given by mistake are not loaded."""
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate((1 << 31) + 1)
    with pytest.raises(PolicyError, match="2147483649 bytes are too many"):
        start(spec.format(path))


@pytest.mark.parametrize("spec", [GATES, KERNELS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_files_with_numbers_that_are_none_are_refused(
    spec: str, bad: float, tmp_path: Path
) -> None:
    """Proves that no NaN gets from a file into a memory."""
    for name in tensors_of(spec):
        tensors = tensors_of(spec)
        tensors[name].view(-1)[-1] = bad
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(PolicyError, match=f"tensor '{name}' must hold finite floats"):
            start(spec.format(path))


@pytest.mark.parametrize("spec", [GATES, KERNELS])
def test_files_of_integers_are_refused(spec: str, tmp_path: Path) -> None:
    """Proves that parameters are floats."""
    path = tmp_path / "integers.safetensors"
    save_file({name: x.long() for name, x in tensors_of(spec).items()}, path)
    with pytest.raises(PolicyError, match="must hold finite floats"):
        start(spec.format(path))


@pytest.mark.parametrize(
    "beta",
    [
        torch.zeros(1, 4),
        torch.zeros(2, 2),
        torch.zeros(2, 8),
        torch.zeros(4),
        torch.zeros(2, 4, 1),
        torch.zeros(0, 4),
    ],
    ids=str,
)
def test_gates_of_another_model_are_refused(beta: Tensor, tmp_path: Path) -> None:
    """Proves that gates need this layer and one number per query head."""
    path = tmp_path / "gates.safetensors"
    save_file({"beta": beta}, path)
    with pytest.raises(PolicyError, match=r"'beta' \[layers, 4\] with layer 1, got .*train them"):
        start(GATES.format(path))


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 3, HEAD_DIM, HEAD_DIM),
        (2, 1, 3, HEAD_DIM, HEAD_DIM),
        (2, 2, 4, HEAD_DIM, HEAD_DIM),
        (2, 2, 3, HEAD_DIM, HEAD_DIM // 2),
        (2, 3, HEAD_DIM, HEAD_DIM),
    ],
    ids=str,
)
def test_kernels_of_another_model_are_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Proves that kernels need this layer, these KV heads, this rate and this head dimension."""
    path = tmp_path / "kernels.safetensors"
    save_file({**tensors_of(KERNELS), name: torch.zeros(shape)}, path)
    with pytest.raises(PolicyError, match=rf"kernels '{name}' \[.*got .*fit them to this model"):
        start(KERNELS.format(path))


@pytest.mark.parametrize("spec", [GATES, KERNELS])
def test_files_of_something_else_are_refused(spec: str, tmp_path: Path) -> None:
    """Proves that a file without the tensors is named with what it should hold."""
    path = tmp_path / "weights.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(PolicyError, match="got none"):
        start(spec.format(path))


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "floats"),
    [
        ("bswa:block=4,segments=1", 0),
        ("compressive:budget=9", 0),
        ("centroid:budget=9", 0),
        ("infini:segment=4", 0),
        ("infini:segment=4,gate=0.0", 0),
        ("infini:segment=4,gate=0.5", 64 * 64 + 64 + 5 * 3),
        ("infini:segment=4,gate=calibrated", 64 * 64 + 64 + 5 * 3),
    ],
)
def test_floats_beside_the_slots_are_counted(spec: str, floats: int) -> None:
    """Proves the figure that planners use: D D_v + D + 5 G numbers per KV head."""
    assert floats_beside(kvpolicy.parse(spec), 64, 3) == floats


@pytest.mark.parametrize("group", [1, 3])
def test_a_matrix_takes_what_is_counted(group: int) -> None:
    """Proves the same figure on the tensors that a memory is made of."""
    policy = kvpolicy.parse("infini:segment=4,gate=0.5")
    case = Case(lengths=(9, 9), kv_heads=2, group=group)
    memory = Host(policy, case, case.rows()).slots.memory
    assert memory is not None
    floats = floats_beside(policy, HEAD_DIM, group)
    assert memory.num_bytes == 4 * floats * case.kv_heads * len(case.lengths)


@pytest.mark.parametrize(
    ("spec", "figures"),
    [
        # 50 tokens under Occupancy(6, 3, 6): 14 evictions of 3, 6 slots of 3 tokens are left
        ("compressive:budget=12", [(8, 0), (9, 3), (26, 18), (27, 18), (50, 18)]),
        ("compressive:budget=12,fn=most-used", [(8, 0), (9, 1), (26, 6), (50, 6)]),
        ("compressive:budget=12,min_similarity=1.0", [(9, 0), (50, 0)]),
        ("centroid:budget=12", [(9, 0), (10, 1), (50, 41)]),
        ("fam:block=4,segments=1,slots=3", [(7, 0), (8, 4), (50, 44)]),
        ("infini:segment=4,gate=0.5", [(3, 0), (4, 4), (50, 48)]),
    ],
)
def test_merged_tokens_are_those_that_a_memory_stands_for(
    spec: str, figures: list[tuple[int, float]]
) -> None:
    """Proves the ledger's figure, worked out by hand, of both rows of a batch."""
    case = Case(lengths=(50, 50))
    policy = kvpolicy.parse(spec)
    host = Host(policy, case, case.rows())
    assert isinstance(policy, MemoryPolicy)
    for n in range(1, 51):
        host.step([0, 1])
        for tokens, merged in figures:
            if tokens == n:
                evicted = host.slots.evicted[1]
                assert evicted == policy.occupancy.evicted(n)
                assert host.slots.memory is not None
                assert policy.merged(host.slots.memory, 1, evicted) == merged
