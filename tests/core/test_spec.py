"""The spec grammar: what it accepts, prints, refuses, and how fast."""

import time
from typing import Literal

import pytest
from hypothesis import example, given

import kvpolicy
from kvpolicy.policies.h2o import H2O
from kvpolicy.policies.random import Random
from kvpolicy.policies.sinks import Sinks
from kvpolicy.policies.tova import TOVA
from kvpolicy.policies.window import Window
from kvpolicy.policy import Parameter, Protection
from kvpolicy.spec import Spec, parse_number, parse_spans, shown, split_spec
from strategies import HOSTILE_SPECS, policies


@given(policy=policies())
@example(policy=H2O(budget=8, recent=1))
@example(policy=H2O(budget=8, recent=1.0))
@example(policy=H2O(budget=8, recent=0))
@example(policy=TOVA(budget=8, recent=0.0))
@example(policy=H2O(budget=8, decay=1))
@example(policy=H2O(budget=8, recent=1e-9))
def test_canonical_spec_parses_back_to_the_policy(policy: kvpolicy.CachePolicy) -> None:
    """Proves parse(str(p)) == p, with equal hash and the same spec again."""
    again = kvpolicy.parse(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)
    assert type(again) is type(policy)


@given(text=HOSTILE_SPECS)
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    """Proves that no spec escapes with another exception, and that messages are one short line."""
    try:
        policy = kvpolicy.parse(text)
    except kvpolicy.PolicyError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 500
    else:
        assert kvpolicy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", "full"),
        ("  window:budget=4  ", "window:budget=4"),
        ("window: budget = 4 , interval = 2", "window:budget=4,interval=2"),
        ("window:budget=64,interval=4", "window:budget=64"),
        ("h2o:recent=0.5,budget=1024", "h2o:budget=1024"),
        ("h2o:budget=64,protect=prompt", "h2o:budget=64,protect=prompt"),
        ("window:budget=64,protect=( 0:8 , 20:24 )", "window:budget=64,protect=(0:8,20:24)"),
        ("h2o:budget=8,score=mean,decay=5e-1", "h2o:budget=8,score=mean,decay=0.5"),
        (
            "sinks:rope=reindex,rope_beyond=allow,budget=8",
            "sinks:budget=8,rope_beyond=allow,rope=reindex",
        ),
    ],
)
def test_spelling_does_not_matter(text: str, policy: str) -> None:
    """Proves that spaces, order and spelled-out defaults give the same canonical spec."""
    assert str(kvpolicy.parse(text)) == policy


def test_int_and_float_values_differ() -> None:
    """Proves that recent=1 is one token and recent=1.0 the whole budget, in == and in dicts."""
    one, whole = kvpolicy.parse("h2o:budget=8,recent=1"), kvpolicy.parse("h2o:budget=8,recent=1.0")
    assert (one.recent_slots, whole.recent_slots) == (1, 8)
    assert one != whole
    assert len({one, whole}) == 2


def test_a_policy_passes_through_parse() -> None:
    """Proves that parse takes policies as well as specs."""
    policy = Window(budget=4)
    assert kvpolicy.parse(policy) is policy


def test_policies_of_different_classes_are_unequal() -> None:
    """Proves that equal parameters do not make different policies equal."""
    assert Window(budget=4) != Random(budget=4)
    assert Window(budget=4) != "window:budget=4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["''", "name:key=value"]),
        (":budget=4", ["':budget=4'", "name:key=value"]),
        ("full:", ["'full:'", "name:key=value"]),
        ("window:budget", ["'budget'", "key=value"]),
        ("window:budget=", ["'budget='", "key=value"]),
        ("window:=4", ["'=4'", "key=value"]),
        ("window:budget=4,", ["''", "key=value"]),
        ("window:budget=4,budget=4", ["'budget'", "twice", "keep one"]),
        ("window:budget=4,protect=(0:1", ["unbalanced"]),
        ("window:budget=4,protect=)0:1(", ["unbalanced"]),
        ("lru:budget=4", ["'lru'", "full", "h2o", "window", "import path"]),
        ("window:budget=4,sinks=2", ["window", "'sinks'", "budget", "interval", "protect"]),
        ("full:budget=4", ["full", "'budget'", "rope_beyond"]),
        ("window", ["window", "budget", "window:budget=VALUE"]),
        ("window:budget=many", ["window:budget", "'many'", "int"]),
        ("window:budget=4.0", ["window:budget", "4.0", "int"]),
        ("window:budget=true", ["window:budget", "'true'", "int"]),
        ("window:budget=(4)", ["window:budget", "'(4)'", "int"]),
        ("window:budget=0", ["budget=0", "at least 1"]),
        ("window:budget=4,interval=0", ["interval=0", "at least 1"]),
        ("window:budget=-4", ["budget=-4", "at least 1"]),
        ("window:budget=4,prefill=lazy", ["window:prefill", "'lazy'", "stream | bulk"]),
        ("window:budget=4,protect=all", ["window:protect", "'all'", "prompt or spans (a:b,c:d)"]),
        ("window:budget=4,protect=prompt,prefill=bulk", ["protect=prompt", "prefill=bulk"]),
        ("window:budget=4,protect=prompt,rope=reindex", ["rope=reindex", "rope=keep"]),
        ("bswa:block=4,segments=1,prefill=bulk", ["whole blocks", "drop prefill=bulk"]),
        ("centroid:budget=8,protect=prompt", ["drop protect"]),
        ("window:budget=4,protect=2", ["window:protect", "'2'", "(a:b,c:d)"]),
        ("window:budget=4,protect=(2)", ["window:protect", "'(2)'", "(a:b,c:d)"]),
        ("window:budget=4,protect=(2:2)", ["2:2", "a < b"]),
        ("window:budget=4,protect=(-2:2)", ["-2:2", "a < b"]),
        ("window:budget=4,protect=(0:5)", ["5 slots", "budget=4", "raise budget"]),
        ("window:budget=2,protect=(0:1,0:1,0:1)", ["3 protect spans", "budget=2", "merge"]),
        ("window:budget=4,protect=(0:1.5)", ["window:protect", "'(0:1.5)'", "(a:b,c:d)"]),
        ("random:budget=4,seed=x", ["random:seed", "'x'", "int"]),
        ("random:budget=4,seed=18446744073709551616", ["random:seed", "2**62"]),
        ("sinks:budget=4", ["sinks", "budget=4", "sinks=4", "raise budget or lower sinks"]),
        ("sinks:budget=4,sinks=-1", ["sinks=-1", "negative"]),
        ("tova:budget=4,sinks=4", ["tova", "budget=4", "sinks=4", "raise budget"]),
        ("tova:budget=4,sinks=-1", ["tova", "sinks=-1", "negative"]),
        ("tova:budget=4,recent=-0.5", ["tova", "recent=-0.5", "negative"]),
        ("tova:budget=4,recent=1.5", ["recent=1.5", "0.0..1.0", "int"]),
        ("tova:budget=4,recent=5", ["5 slots", "budget=4", "raise budget"]),
        ("tova:budget=4,recent=nan", ["tova:recent", "'nan'", "int or float"]),
        ("tova:budget=4,recent=inf", ["tova:recent", "'inf'", "int or float"]),
        ("tova:budget=4,group_pool=max", ["scope=layer", "group_pool=max", "scope=head"]),
        ("h2o:budget=4,group_pool=median", ["h2o:group_pool", "'median'", "mean | max | sum"]),
        ("h2o:budget=4,score=best", ["h2o:score", "'best'", "sum | mean | relative"]),
        ("h2o:budget=4,decay=0", ["decay", "(0, 1]", "0"]),
        ("h2o:budget=4,decay=1.1", ["decay", "(0, 1]", "1.1"]),
        ("h2o:budget=4,rope=reindex", ["rope=reindex", "rope=keep"]),
        ("window:budget=4,rope=reindex,protect=(0:1)", ["rope=reindex", "rope=keep"]),
        ("window:budget=4,rope_beyond=maybe", ["rope_beyond", "'maybe'", "refuse | allow"]),
        ("no.such.module.Policy:budget=4", ["'no.such.module.Policy'", "ModuleNotFoundError"]),
        ("kvpolicy.nothing:budget=4", ["'kvpolicy.nothing'", "AttributeError"]),
        ("math.pi", ["math.pi", "ScorePolicy"]),
        ("json.JSONDecoder:budget=4", ["json.JSONDecoder", "ScorePolicy"]),
    ],
)
def test_error_says_what_got_and_what_is_valid(text: str, words: list[str]) -> None:
    """Proves that every refusal names the key or name, the value given and the way out."""
    with pytest.raises(kvpolicy.PolicyError) as caught:
        kvpolicy.parse(text)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "window:" + "x" * 1_000_000,
        "window:budget=" + "9" * 1_000_000,
        "window:budget=" + "9" * 4_000,
        "window:budget=4,protect=(0:" + "9" * 1_000_000 + ")",
        "window:budget=4,protect=(" + "0:1," * 250_000 + "0:1)",
        "window:budget=4,protect=" + "(" * 500_000 + ")" * 500_000,
        "window:budget=4,protect=" + "(" * 1_000_000,
        "window:" + ",".join(f"k{i}=1" for i in range(100_000)),
        "window:budget=4,budget=" + "=" * 1_000_000,
        "." * 1_000_000,
        "a." * 500_000 + "a",
        "\0\x1b[2J\n" * 100_000,
    ],
    ids=range(13),
)
def test_hostile_specs_fail_fast_with_a_short_message(text: str) -> None:
    """Proves that size and nesting cost no time, no recursion and no page of output."""
    started = time.process_time()
    with pytest.raises(kvpolicy.PolicyError) as caught:
        kvpolicy.parse(text)
    assert time.process_time() - started < 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (lambda: Window(budget=10**5000), "16610 bits"),
        (lambda: Window(budget=True), "True"),
        (lambda: Window(budget=4.0), "4.0"),
        (lambda: Window(budget="4"), "'4'"),
        (lambda: Window(budget=4, protect=[(0, 1)]), "[(0, 1)]"),
        (lambda: Window(budget=4, protect=((0,),)), "((0,),)"),
        (lambda: Window(budget=4, protect=(("a", "b"),)), "'a'"),
        (lambda: Window(budget=4, rope=1), "keep | reindex"),
        (lambda: H2O(budget=4, recent=float("nan")), "nan"),
        (lambda: H2O(budget=4, decay="1"), "'1'"),
    ],
)
def test_constructor_refuses_what_a_spec_could_not_say(policy: object, word: str) -> None:
    """Proves that parameters given from Python are checked like those of a spec."""
    with pytest.raises(kvpolicy.PolicyError) as caught:
        policy()
    assert word in str(caught.value)


@pytest.mark.parametrize("spec", [None, 4, b"full", ["full"]])
def test_only_strings_and_policies_are_specs(spec: object) -> None:
    """Proves that other types are refused with an example of what is right."""
    with pytest.raises(kvpolicy.PolicyError, match="a string such as 'window:budget=256'"):
        kvpolicy.parse(spec)


def test_unnamed_policies_go_by_their_class_in_messages() -> None:
    """Proves that a custom policy without a name still says whose parameter is wrong."""

    class Mine(kvpolicy.ScorePolicy):
        """Has no name."""

    with pytest.raises(kvpolicy.PolicyError, match=r"^Mine: budget and interval"):
        Mine(budget=0)
    with pytest.raises(kvpolicy.PolicyError, match=r"^Mine:sinks: got 'a'"):
        Mine(budget=4, sinks="a")


def test_policies_are_frozen() -> None:
    """Proves that configuration cannot be changed once made."""
    with pytest.raises(AttributeError):
        Sinks(budget=8).budget = 9


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "7", 7),
        (int | float, "7", 7),
        (int | float, "7.5", 7.5),
        (bool, "True", True),
        (bool, "false", False),
        (str, "7", "7"),
        (str, "(a,b:c)", "(a,b:c)"),
        (int | None, "7", 7),
        (str | None, "x", "x"),
        (int | str, "7", 7),
        (int | str, "x", "x"),
        (Literal[1, 2], "2", 2),
        (Literal["a", "b"], "b", "b"),
        (Protection, "(0:1,2:3)", ((0, 1), (2, 3))),
        (Protection, "prompt", "prompt"),
    ],
)
def test_parameters_of_any_declared_kind_can_be_read(
    kind: object, text: str, value: object
) -> None:
    """Proves that custom policies may use plain types, unions, optionals and literals."""
    parameter = Parameter("x", kind, None)
    read = parameter.read(text, "x")
    parameter.check(read, "x")
    assert (read, type(read)) == (value, type(value))


def test_optional_parameters_may_be_absent() -> None:
    """Proves that None is a value only where the annotation allows it."""
    Parameter("x", int | None, None).check(None, "x")
    with pytest.raises(kvpolicy.PolicyError, match="x: got None, expected int"):
        Parameter("x", int, 0).check(None, "x")


def test_split_keeps_parenthesised_separators() -> None:
    """Proves that commas and colons inside parentheses are literal."""
    assert split_spec("a.b.C:x=(1:2,3:4),y=(a=b,(c))") == Spec(
        "a.b.C", {"x": "(1:2,3:4)", "y": "(a=b,(c))"}
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("-1", -1),
        ("1.0", 1.0),
        ("1e3", 1000.0),
        *((text, None) for text in ("x", "", "nan", "inf", "-inf", "1e999", "9" * 5000)),
    ],
)
def test_numbers_are_ints_before_floats_and_finite(text: str, number: float | None) -> None:
    """Proves the reading of numbers, whose type carries meaning."""
    read = parse_number(text)
    assert (read, type(read)) == (number, type(number))


@pytest.mark.parametrize("text", ["0:1", "(", "()", "(1)", "(1:)", "(:1)", "(1:2,)", "(1:2:3)"])
def test_spans_need_two_ends_in_parentheses(text: str) -> None:
    """Proves that half-written spans are not guessed at."""
    assert parse_spans(text) is None


def test_shown_cuts_the_middle_of_long_values() -> None:
    """Proves that messages keep both ends of what they quote."""
    assert shown("short") == "'short'"
    assert shown("a" * 500 + "z").startswith("'aaa")
    assert shown("a" * 500 + "z").endswith("az'")
    assert len(shown("a" * 500)) < 80
