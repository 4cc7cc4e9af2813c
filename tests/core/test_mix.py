"""Policies by layers: what a mix says, what it refuses, and that layers only see their own."""

import pytest

import kvpolicy
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy.policies.mix import Mix
from kvpolicy.rehearsal import Case, by_chunks, by_steps

SPEC = "mix:layers=(0:window;1-2:h2o:recent=0.25,protect=(0:2,5:6);3-:tova),budget=9,interval=4"


def mix(spec: str = SPEC) -> Mix:
    """A mix from its spec."""
    policy = kvpolicy.parse(spec)
    assert isinstance(policy, Mix)
    return policy


def test_layers_get_the_policy_of_their_part() -> None:
    """Ranges include both ends, a single layer is a part, and an open range has no end."""
    found = [str(mix().of_layer(layer)) for layer in (0, 1, 2, 3, 999)]
    assert found == [
        "window:budget=9,interval=4",
        "h2o:budget=9,interval=4,protect=(0:2,5:6),recent=0.25",
        "h2o:budget=9,interval=4,protect=(0:2,5:6),recent=0.25",
        "tova:budget=9,interval=4",
        "tova:budget=9,interval=4",
    ]


def test_a_part_may_say_more_than_the_mix() -> None:
    """Common keys are for parts that take them and do not give them."""
    policy = mix("mix:layers=(0-3:full;4:sinks:budget=16;5-:h2o),budget=256,rope_beyond=allow")
    assert [str(member) for member in policy.members] == [
        "full:rope_beyond=allow",
        "sinks:budget=16,rope_beyond=allow",
        "h2o:budget=256,rope_beyond=allow",
    ]


@pytest.mark.parametrize(
    "spec",
    [SPEC, "mix:layers=(0-3:full;4-:h2o),budget=256", "mix:layers=(0-:random:seed=3,budget=8)"],
)
def test_a_mix_is_a_value(spec: str) -> None:
    """Its spec parses back to it, with equal hashes."""
    assert str(mix(spec)) == spec
    assert mix(str(mix(spec))) == mix(spec)
    assert hash(mix(spec)) == hash(mix(spec))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mix:budget=4", "mix needs layers"),
        ("mix:layers=0-:full", "got '0-:full', expected every layer once"),
        ("mix:layers=()", "expected every layer once"),
        ("mix:layers=(0-1:full;full)", "got 'full'"),
        ("mix:layers=(5-3:full)", "got '5-3:full'"),
        ("mix:layers=(1-:full)", "the first layers are 1-"),
        ("mix:layers=(0-3:full;5-:full)", "layers 5- do not follow on 0-3"),
        ("mix:layers=(0-3:full;3-:full)", "layers 3- do not follow on 0-3"),
        ("mix:layers=(0-:full;4-:full)", "layers 4- do not follow on 0-"),
        ("mix:layers=(0-:h2o)", "h2o needs budget"),
        ("mix:layers=(0-:lru)", "unknown policy 'lru'"),
        ("mix:layers=(0-:h2o:budget=8,size=3)", "h2o has no key 'size'"),
        ("mix:layers=(0-:full),budget=8", "no part of it takes budget from it"),
        ("mix:layers=(0-:full),interval=8", "no part of it takes interval from it"),
        ("mix:layers=(0-:h2o:budget=4),budget=8", "no part of it takes budget from it"),
        ("mix:layers=(0-:mix:layers=(0-:full))", "a part cannot be a mix"),
        ("mix:layers=(0-1:full;2-:sinks:rope=reindex),budget=8", "use rope=keep in layers 2-"),
        ("mix:layers=(0:h2o:prefill=bulk;1-:h2o),budget=8", "treat prompts in different ways"),
        ("mix:layers=(0-:full", "unbalanced parentheses"),
    ],
)
def test_what_is_no_mix_is_refused(spec: str, told: str) -> None:
    """Gaps, overlaps, unknown parts and keys are errors that say what and how to mend it."""
    with pytest.raises(PolicyError) as caught:
        kvpolicy.parse(spec)
    assert told in str(caught.value)


def test_a_layer_without_a_policy_is_refused() -> None:
    """A closed range does not cover a deeper model, and says so."""
    with pytest.raises(PolicyError, match=r"no policy for layer 4; let its last layers be open"):
        mix("mix:layers=(0-3:full)").of_layer(4)


def test_one_law_where_all_parts_have_it_otherwise_none() -> None:
    """Hosts that need equal layers get their law, or an error that names the way out."""
    assert mix().occupancy == kvpolicy.parse("window:budget=9,interval=4").occupancy
    with pytest.raises(UnsupportedError, match="layers hold different numbers of slots"):
        _ = mix("mix:layers=(0-3:full;4-:h2o),budget=256").occupancy


def test_what_a_mix_does_is_what_its_parts_do() -> None:
    """It evicts if a part does, and treats prompts as the parts that evict."""
    policy = mix("mix:layers=(0-3:full;4-:h2o:prefill=bulk),budget=256")
    assert (policy.evicts, policy.prompts, policy.needs_prompt) == (True, "bulk", True)
    policy = mix("mix:layers=(0-:full)")
    assert (policy.evicts, policy.prompts, policy.needs_prompt) == (False, "stream", False)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("run", [by_steps, by_chunks])
def test_a_layer_does_what_it_does_under_its_part_alone(layer: int, run: object) -> None:
    """In the core a layer of a mix equals the same layer under its own policy, bit by bit."""
    case = Case((33, 20), chunks=(7,), layer=layer, seed=layer)
    assert callable(run)
    mixed, alone = run(mix(), case), run(mix().of_layer(layer), case)
    assert mixed.retained == alone.retained
    assert all((a == b).all() for a, b in zip(mixed.outputs, alone.outputs, strict=True))
