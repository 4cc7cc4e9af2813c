"""Policy specs as the oracles read them: every key, every default, the occupancy law.

Written from the definition, sharing no code with the engine's parser.
"""

import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a spec string says, with every default filled in.

    `budget` counts the tokens and the `state_slots` of a memory; blocks and segments are
    turned into budget and interval.
    """

    name: str
    budget: int | None = None
    interval: int = 1
    state_slots: int = 0
    prefill: str = "stream"
    keeps_prompt: bool = False
    sinks: int = 0
    recent: int = 0
    protect: tuple[tuple[int, int], ...] = ()
    scope: str = "layer"
    group_pool: str = "mean"
    score: str = "sum"
    decay: float = 1.0
    seed: int = 0
    window: int = 0
    kernel: int = 1
    rope: str = "keep"
    rate: int = 1
    fn: str = "mean"
    bias: str = "log"
    weights: str | None = None
    min_similarity: float = -1.0
    block: int = 1
    segments: int | None = None
    level: str = "kv"
    query: str = "current"
    update: str = "linear"
    gate: str | float = "closed"

    @property
    def is_exact(self) -> bool:
        """Whether scores are integers, so that rounding excuses no difference."""
        return self.name not in ("h2o", "tova", "snapkv", "knorm", "keydiff")

    @property
    def has_memory(self) -> bool:
        """Whether anything is kept beside tokens."""
        return self.state_slots > 0 or (self.name == "infini" and self.gate not in ("closed", 0.0))


COMMON = {"budget", "interval", "prefill", "protect", "rope", "rope_beyond"}
SCORED = COMMON | {"sinks", "recent", "scope", "group_pool"}
UNSCORED = {"prefill", "rope", "rope_beyond"}
KEYS = {
    "full": UNSCORED,
    "window": COMMON,
    "sinks": COMMON | {"sinks"},
    "h2o": SCORED | {"score", "decay"},
    "tova": SCORED,
    "snapkv": (SCORED - {"recent"}) | {"window", "kernel"},
    "knorm": COMMON | {"sinks", "recent"},
    "keydiff": COMMON | {"sinks", "recent"},
    "random": COMMON | {"sinks", "recent", "seed"},
    "bswa": UNSCORED | {"block", "segments", "sinks"},
    "compressive": (COMMON - {"protect"})
    | {"rate", "memory", "fn", "bias", "weights", "min_similarity", "sinks"},
    "centroid": COMMON | {"slots", "bias", "sinks"},
    "fam": UNSCORED | {"budget", "block", "segments", "slots", "level", "query", "bias", "sinks"},
    "infini": UNSCORED | {"segment", "update", "gate"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": 4},
    "h2o": {"recent": 0.5, "scope": "head"},
    "snapkv": {"scope": "head", "window": 64, "kernel": 5, "prefill": "bulk"},
    "knorm": {"scope": "head"},
    "keydiff": {"scope": "head"},
    "random": {"scope": "head"},
    "compressive": {"scope": "head", "rate": 3, "memory": 0.5},
    "centroid": {"scope": "head", "slots": 0.25},
    "bswa": {"scope": "head"},
    "fam": {"scope": "head", "slots": 64},
    "infini": {"scope": "head"},
}
CHOICES = {
    "scope": {"head", "layer"},
    "group_pool": {"mean", "max", "sum"},
    "score": {"sum", "mean", "relative"},
    "rope": {"keep", "reindex"},
    "prefill": {"stream", "bulk"},
    "fn": {"mean", "max", "most-used", "conv", "attention"},
    "bias": {"log", "none"},
    "level": {"kv", "model"},
    "query": {"current", "previous"},
    "update": {"linear", "delta"},
}


def parse(text: str) -> Spec:
    """Read a spec such as `h2o:budget=16,recent=0.5,protect=(0:2,5:6)`."""
    name, _, rest = text.partition(":")
    given = dict(_read_pair(name, pair) for pair in _split_outside_parentheses(rest))
    values = DEFAULTS.get(name, {}) | given
    if values.get("scope", "layer") == "layer" and "group_pool" in given:
        raise ValueError(f"{text}: scope=layer is the mean over all query heads; drop group_pool")
    values.pop("rope_beyond", None)
    if values.get("protect") == "prompt":
        values |= {"protect": (), "keeps_prompt": True}
    if name == "full":
        return Spec(name=name, **values)
    if name in ("bswa", "fam", "infini"):
        return _checked(Spec(name=name, **_in_blocks(name, values)))
    if "budget" not in given:
        raise ValueError(f"{text}: a budget is required")
    budget = values["budget"]
    values["recent"] = _count(values.get("recent", 0), budget)
    if name == "snapkv":
        values["recent"] = values["window"]
    values.setdefault("interval", max(1, budget // 16))
    if name == "compressive":
        values["interval"] = -(-values["interval"] // values["rate"]) * values["rate"]
    if name in ("compressive", "centroid"):
        share = values.pop("memory" if name == "compressive" else "slots")
        values["state_slots"] = _count(share, budget)
    return _checked(Spec(name=name, **values))


def _in_blocks(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Say blocks and segments as budget and interval."""
    if name == "infini":
        segment = values.pop("segment")
        return values | {"budget": 0, "interval": segment}
    slots, sinks = values.pop("slots", 0), values.get("sinks", 0)
    if "segments" not in values:
        values["segments"] = (values["budget"] - slots - sinks) // values["block"]
    budget = values["segments"] * values["block"] + sinks + slots
    if values.setdefault("budget", budget) != budget:
        raise ValueError(f"{name}: blocks, sinks and slots make budget={budget}: got {values}")
    return values | {"interval": values["block"], "state_slots": slots}


def _split_outside_parentheses(text: str) -> list[str]:
    return re.split(r",(?![^(]*\))", text) if text else []


def _read_pair(name: str, pair: str) -> tuple[str, Any]:
    key, _, word = pair.partition("=")
    if name not in KEYS:
        raise ValueError(f"the oracle knows {sorted(KEYS)}; got {name!r}")
    if key not in KEYS[name]:
        raise ValueError(f"{name} takes {sorted(KEYS[name])}; got {key!r}")
    if key in CHOICES and word not in CHOICES[key]:
        raise ValueError(f"{name}: {key} is one of {sorted(CHOICES[key])} here; got {word!r}")
    return key, _read_value(word)


def _read_value(word: str) -> Any:
    if word.startswith("("):
        spans = (span.split(":") for span in word[1:-1].split(","))
        return tuple((int(start), int(stop)) for start, stop in spans)
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            continue
    return word


def _count(tokens: int | float, budget: int) -> int:
    """Turn a share into tokens: an int is a count, a float a share of the budget."""
    return tokens if isinstance(tokens, int) else math.floor(tokens * budget)


def _checked(spec: Spec) -> Spec:
    assert spec.budget is not None
    pinned = set(range(spec.sinks)).union(*(range(*span) for span in spec.protect))
    tokens = spec.budget - spec.state_slots
    in_blocks = spec.name in ("bswa", "fam", "infini")
    if tokens < (0 if in_blocks else 1) or spec.interval < 1:
        raise ValueError(f"budget and interval are at least 1: got {spec}")
    if spec.name == "sinks" and spec.budget <= spec.sinks:
        raise ValueError(f"budget must exceed sinks: got {spec}")
    if spec.keeps_prompt and spec.prefill == "bulk":
        raise ValueError(f"bulk evicts the prompt that protect=prompt keeps: got {spec}")
    if (in_blocks or spec.has_memory) and (spec.keeps_prompt or spec.prefill == "bulk"):
        raise ValueError(f"blocks and groups leave no prompt apart: got {spec}")
    if len(pinned) + spec.recent > tokens:
        raise ValueError(f"more protected tokens than budget: got {spec}")
    return spec


def token_slots(num_tokens: int, spec: Spec, prompt: int = 0) -> int:
    """Token slots held after `num_tokens` tokens, `prompt` of them a prompt: the occupancy law."""
    if spec.budget is None:
        return num_tokens
    kept = spec.budget - spec.state_slots
    if spec.keeps_prompt:
        generated = max(0, num_tokens - prompt)
        return num_tokens - generated + _sawtooth(generated, kept, spec.interval)
    if spec.prefill == "bulk" and prompt > kept:
        if num_tokens < prompt:
            return num_tokens
        return kept + (num_tokens - prompt) % spec.interval
    return _sawtooth(num_tokens, kept, spec.interval)


def _sawtooth(num_tokens: int, kept: int, interval: int) -> int:
    if num_tokens < kept + interval:
        return num_tokens
    return kept + (num_tokens - kept) % interval


def by_layer(text: str, num_layers: int) -> list[Spec]:
    """What a spec says of every layer: of a mix, each part in its own words."""
    found = re.fullmatch(r"mix:layers=\((.*)\)(?:,budget=(\d+))?(?:,interval=(\d+))?", text)
    if found is None:
        return [parse(text)] * num_layers
    specs: list[Spec] = []
    for part in found[1].split(";"):
        layers, _, spec = part.partition(":")
        for key, value in (("budget", found[2]), ("interval", found[3])):
            if value and f"{key}=" not in spec and spec != "full":
                spec += f"{',' if ':' in spec else ':'}{key}={value}"
        first, dash, last = layers.partition("-")
        end = num_layers if dash and not last else int(last or first) + 1
        specs += [parse(spec)] * (end - int(first))
    return specs[:num_layers]
