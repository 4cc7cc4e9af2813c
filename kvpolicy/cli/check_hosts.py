"""Host parity for `kvpolicy check`: one policy, the same decisions in every installed host.

The simulator is held to the core's own steps on random queries, keys and values. transformers and
vLLM run a random model on texts without repetition; the reference is transformers fed one token
at a time (`check_reference`).
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kvpolicy.agreement import NEAR_TIE
from kvpolicy.cli import one_line
from kvpolicy.cli.check_reference import (
    NEW_TOKENS,
    Model,
    Tally,
    Walk,
    random_model,
    sets_apart,
    walk_through,
)
from kvpolicy.errors import KVPolicyError, PolicyError, UnsupportedError
from kvpolicy.extras import is_installed
from kvpolicy.policy import CachePolicy
from kvpolicy.rehearsal import HEAD_DIM, Case, by_steps, margins
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header, Rope, TraceWriter

Generation: TypeAlias = Any

HOSTS = {"simulator": None, "transformers": "transformers", "vllm": "vllm"}
"""Hosts, in the order of checking, and the packages that they need."""

PROMPTS = (70, 133, 201)
"""Tokens of the prompts."""

_LAYERS = 2
_KV_MEMORY = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """What came out of comparing one host.

    Attributes:
        host: Its name.
        outcome: ``agrees``, ``differs``, ``undecided``, ``refused`` or ``not installed``.
        detail: What was compared, or what is wrong.
    """

    host: str
    outcome: str
    detail: str

    @property
    def is_sound(self) -> bool:
        """Whether nothing speaks against the policy in this host."""
        return self.outcome in ("agrees", "refused", "not installed")


def verdict_of(tally: Tally, host: str, compared: str) -> Verdict:
    """Sum comparisons up; what agrees nowhere proves nothing."""
    if tally.difference is not None:
        return Verdict(host, "differs", tally.difference)
    if not tally.agreeing:
        told = "every comparison met a near-tie: scores lie too close together to compare hosts"
        return Verdict(host, "undecided", told)
    excused = f" ({tally.excused} sets met near-ties)" if tally.excused else ""
    return Verdict(host, "agrees", f"{compared}: {tally.agreeing} equal sets{excused}")


class Stage:
    """What all hosts are given: the policy, and a model with prompts where one is needed.

    Args:
        policy: The policy.
        folder: An empty folder for files.
    """

    def __init__(self, policy: CachePolicy, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self._walks: list[Walk] = []
        self._model: Model = None

    @property
    def model(self) -> Model:
        """A random model of the bundled one's shape, saved with its tokenizer in `folder`."""
        if self._model is None:
            self._model = random_model(self.folder)
        return self._model

    @property
    def walks(self) -> list[Walk]:
        """The reference runs."""
        if not self._walks:
            draw = random.Random(0)
            tokens = range(self.model.config.vocab_size)
            prompts = [draw.sample(tokens, length) for length in PROMPTS]
            self._walks = [walk_through(self.model, prompt, self.policy) for prompt in prompts]
        return self._walks


def compare_hosts(
    policy: CachePolicy, hosts: Sequence[str], advance: Callable[[float], object]
) -> Iterator[Verdict]:
    """Compare hosts with the reference, one after the other.

    Args:
        policy: The policy, with a budget that the prompts exceed.
        hosts: Keys of `HOSTS`.
        advance: Told after every host.

    Raises:
        PolicyError: The policy evicts nothing from so few tokens.
    """
    _require_evictions(policy)
    with tempfile.TemporaryDirectory(prefix="kvpolicy-") as folder:
        stage = Stage(policy, Path(folder))
        for host in hosts:
            package = HOSTS[host]
            if package is not None and not is_installed(package):
                yield Verdict(host, "not installed", f"there is no package {package}")
            else:
                yield _verdict(host, stage)
            advance(1)


def _verdict(host: str, stage: Stage) -> Verdict:
    compare = {"simulator": _simulator, "transformers": _transformers, "vllm": _vllm}[host]
    try:
        _require_supported(host, stage)
    except UnsupportedError as error:
        return Verdict(host, "refused", str(error))
    try:
        return compare(stage)
    except Exception as error:  # whatever a stranger's policy does there
        return failed(host, error)


def _require_supported(host: str, stage: Stage) -> None:
    """Raise UnsupportedError if a host refuses the policy up front."""
    if host == "simulator":
        from kvpolicy_sim.support import require_supported

        require_supported(_header(_cases()), [stage.policy], "layer-local")
    elif host == "transformers":
        from kvpolicy_hf import PolicyCache

        PolicyCache(stage.model, stage.policy)
    else:
        from kvpolicy_vllm.config import check_policy

        check_policy(stage.policy)


def failed(host: str, error: Exception) -> Verdict:
    """The verdict on a policy that raised."""
    kind = "" if isinstance(error, KVPolicyError) else f"{type(error).__name__}: "
    return Verdict(host, "differs", f"it fails: {kind}{one_line(error)}")


def _simulator(stage: Stage) -> Verdict:
    """Replay random inputs and compare the sets after every token with the core's own steps."""
    from kvpolicy_sim import replay

    policy, cases = stage.policy, _cases()
    trace = _write_trace(stage.folder / "random.kvtrace", cases)
    report = replay(trace, policy, outputs=False, details=False, threads=1)
    tally = Tally()
    for case in cases:
        run = by_steps(policy, case)
        settled: set[int] = set()
        for n, expected in sorted(run.retained[0].items()):
            found = report.retained_positions(policy, case.layer, tokens=n).tolist()
            made = run.decisions.get((0, n))
            for head in {*range(case.kv_heads)} - settled:
                where = f"after {n} random tokens, layer {case.layer}, KV head {head}"
                apart = sets_apart([*expected[head]], found[head], where, "the core")
                is_legal = made is not None and margins(made)[head] < NEAR_TIE
                tally.add(apart, is_legal=is_legal)
                settled |= set() if apart is None else {head}  # what follows proves nothing
    return verdict_of(
        tally,
        "simulator",
        f"{cases[0].lengths[0]} random tokens, {len(cases)} layers, after every token, with the "
        "core",
    )


def _cases() -> list[Case]:
    """Random inputs of one request, by layer."""
    tokens, prompt = PROMPTS[-1] + NEW_TOKENS, PROMPTS[0]
    return [Case((tokens,), layer=layer, seed=layer, prompts=(prompt,)) for layer in range(_LAYERS)]


def _write_trace(path: Path, cases: Sequence[Case]) -> Path:
    """A trace of the cases' random inputs, one layer each."""
    with TraceWriter(path, _header(cases)) as writer:
        sequence = writer.begin(prompt_len=cases[0].prompt(0), source="random")
        for case in cases:
            for kind, x in case.rows()[0]._asdict().items():
                writer.append(sequence, case.layer, kind, 0, x)
    return path


def _header(cases: Sequence[Case]) -> Header:
    """What a trace of the cases says about itself."""
    first, rotary = cases[0], Rotary.from_theta(1e4, HEAD_DIM)
    return Header(
        model="random",
        model_type="random",
        num_layers=len(cases),
        num_query_heads=first.kv_heads * first.group,
        num_kv_heads=first.kv_heads,
        layers=tuple(range(len(cases))),
        kv_heads=tuple(range(first.kv_heads)),
        head_dim=HEAD_DIM,
        value_dim=HEAD_DIM,
        dtype="float32",
        scale=HEAD_DIM**-0.5,
        rope=Rope("default", tuple(rotary.inverse_frequencies.tolist())),
    )


def _transformers(stage: Stage) -> Verdict:
    """Prompts at once, alone and in a left-padded batch, against one token at a time."""
    from kvpolicy_hf.greedy import generate_greedy

    tally = Tally()
    for walk in stage.walks:
        once = generate_greedy(stage.model, walk.prompt, stage.policy, NEW_TOKENS)
        where = f"prompt of {len(walk.prompt)} tokens at once"
        walk.compare(tally, once.tokens, once.retained, where)
    _compare_padded(tally, stage)
    return verdict_of(
        tally,
        "transformers",
        f"prompts of {', '.join(map(str, PROMPTS))} tokens at once, and padded in one batch, with "
        "one token at a time",
    )


def _compare_padded(tally: Tally, stage: Stage) -> None:
    """Compare the walks' whole texts in one left-padded batch."""
    from kvpolicy_hf import PolicyCache

    texts = [walk.prompt + walk.tokens[:-1] for walk in stage.walks]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    cache = PolicyCache(stage.model, stage.policy, [len(walk.prompt) for walk in stage.walks])
    with torch.inference_mode():
        stage.model(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
    for row, walk in enumerate(stage.walks):
        layers = range(len(walk.retained))
        retained = [cache.retained_positions(layer, row).tolist() for layer in layers]
        walk.compare(tally, walk.tokens, retained, f"row {row} of a left-padded batch")


def _vllm(stage: Stage) -> Verdict:
    """Prompts as one chunked batch of a real engine."""
    from kvpolicy_vllm.plugin import check_version
    from kvpolicy_vllm.trial import Plan, Trial

    check_version()
    plan = Plan(
        model=str(stage.folder),
        policies=(str(stage.policy),),
        prompts=tuple(tuple(walk.prompt) for walk in stage.walks),
        new_tokens=NEW_TOKENS,
        kv_memory=_KV_MEMORY,
        max_model_len=1024,
        chunk=48,
    )
    with Trial() as trial:
        _, generation = trial.generate(plan)
    tally = Tally()
    for index, walk in enumerate(stage.walks):
        fault = generation.ledgers[index].get("fault")
        if fault is not None:
            tally.add(f"it fails there, and a window goes on: {fault}")
        where = f"prompt of {len(walk.prompt)} tokens"
        walk.compare(tally, generation.tokens[index], generation.retained[index], where)
    return verdict_of(
        tally,
        "vllm",
        f"the same prompts in one batch, {plan.chunk} tokens at a time, and {NEW_TOKENS} greedy "
        "tokens, with transformers",
    )


def _require_evictions(policy: CachePolicy) -> None:
    """Refuse to compare what a policy never gets to decide."""
    prompt = PROMPTS[-1]
    tokens = prompt + NEW_TOKENS - 1
    laws = (member.occupancy.of_prompt(prompt) for member in policy.members)
    if policy.evicts and not any(law.evicted(tokens) for law in laws):
        raise PolicyError(
            f"{policy} evicts nothing within {tokens} tokens, so that hosts have nothing to "
            "compare; check it with smaller parameters, or with --no-hosts"
        )
