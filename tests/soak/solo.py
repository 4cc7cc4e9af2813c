"""What each case answers alone, in an engine of this process, and whether answers agree with it.

Two schedules of a request may differ by float32 noise: other sizes of matrix products sum in
another order. So log-probabilities agree up to `NOISE`, and a token may differ only where the
solo run's two best are nearer to each other than twice that. Where a policy decides by attention
the same noise can tip an eviction whose scores are a near-tie, which is legal if the float64
oracle finds one at that request (a relative margin below 1e-3) before the answers part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import kvpolicy_vllm
from fixtures.engines import generate, start_engine
from kvpolicy import bundled_model
from oracles.dense import NEAR_TIE
from oracles.llama import ModelOracle
from soak.cases import ALLOWED, SERVER_POLICY, Case
from soak.clients import Answer

NOISE = 1e-4
"""Largest difference of log-probabilities that float32 rounding explains.

Five times what was measured on the bundled model between batches of 16 in chunks of 256 and solo
runs in one piece: at most 1.8e-5 over 120,000 tokens.
"""


@dataclass(frozen=True)
class Solo:
    """A case's answer when nothing else runs.

    Attributes:
        tokens: Token ids.
        logprobs: Their log-probabilities.
        gaps: By how much each token's log-probability exceeds the second best one's.
    """

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


@dataclass
class Verdict:
    """How answers compared with solo runs.

    Attributes:
        cases: Distinct cases that were repeated alone.
        choices: Answers compared, each choice by itself.
        tokens: Tokens compared.
        noise: Largest difference of log-probabilities where no retained set was tipped.
        token_ties: Choices that part from the solo run where its two best tokens nearly tie.
        set_ties: Choices that part from it after an eviction that is a near-tie.
        faults: All others.
    """

    cases: int = 0
    choices: int = 0
    tokens: int = 0
    noise: float = 0.0
    token_ties: int = 0
    set_ties: int = 0
    faults: list[str] = field(default_factory=list)


class Soloist:
    """Repeats cases one at a time, whole prompts in one forward."""

    def __init__(self) -> None:
        self._answers: dict[Case, Solo] = {}
        self._margins: dict[tuple[Case, int], float] = {}

    def judge(self, answers: Iterable[Answer]) -> Verdict:
        """Compare answers with solo runs of their cases.

        Raises:
            LedgerError: A solo run evicted more or less than the occupancy law says.
        """
        verdict = Verdict()
        for answer in answers:
            self.compare(answer, verdict)
        verdict.cases = len(self._answers)
        kvpolicy_vllm.ledger(self._engine)
        return verdict

    def compare(self, answer: Answer, verdict: Verdict) -> None:
        """Compare an answer, every choice by itself, with the solo run of its case."""
        for tokens, logprobs in zip(answer.tokens, answer.logprobs, strict=True):
            self._compare(answer, tokens, logprobs, verdict)

    def _compare(
        self, answer: Answer, tokens: list[int], logprobs: list[float], verdict: Verdict
    ) -> None:
        case, solo = answer.case.alone, self._solo(answer.case.alone)
        verdict.choices += 1
        verdict.tokens += len(tokens)
        if answer.is_whole and len(tokens) != case.max_tokens:
            verdict.faults.append(f"{case}: {len(tokens)} of {case.max_tokens} tokens")
        common = next(
            (
                i
                for i, pair in enumerate(zip(tokens, solo.tokens, strict=False))
                if pair[0] != pair[1]
            ),
            len(tokens),
        )
        apart = [abs(a - b) for a, b in zip(logprobs[:common], solo.logprobs, strict=False)]
        noisy = next((i for i, difference in enumerate(apart) if difference > NOISE), None)
        parted = common < len(tokens) and solo.gaps[common] > 2 * NOISE
        if noisy is None and not parted:
            verdict.noise = max([verdict.noise, *apart])
            verdict.token_ties += common < len(tokens)
            return
        place = common if noisy is None else noisy
        if case.decides_by_attention and self._margin(case, place) < NEAR_TIE:
            verdict.set_ties += 1
            return
        verdict.faults.append(
            f"{answer.request_id} ({answer.manner}): {answer.case}: token {place}: "
            f"got {tokens[place]} at {logprobs[place]:.6f}, alone {solo.tokens[place]} at "
            f"{solo.logprobs[place]:.6f}, {solo.gaps[place]:.6f} above the second best"
        )

    def _solo(self, case: Case) -> Solo:
        if case not in self._answers:
            [output] = generate(
                self._engine, [[*case.prompt]], case.max_tokens, case.policy, logprobs=2
            )
            choice = output.outputs[0]
            rows = [
                sorted((x.logprob for x in row.values()), reverse=True) for row in choice.logprobs
            ]
            self._answers[case] = Solo(
                tokens=[*choice.token_ids],
                logprobs=[row[0] for row in rows],
                gaps=[row[0] - row[1] for row in rows],
            )
        return self._answers[case]

    @cached_property
    def _engine(self) -> Any:
        return start_engine(
            bundled_model(),
            SERVER_POLICY,
            allow=ALLOWED,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            max_num_seqs=1,
        )

    def _margin(self, case: Case, num_new: int) -> float:
        """The oracle's closest eviction before the forward in which a case's answers part.

        The token that this forward begins with evicts only after its own attention.
        """
        key = case, num_new
        if key not in self._margins:
            oracle = ModelOracle(self._model, case.spec)
            for token in [*case.prompt, *self._solo(case).tokens[:num_new]][:-1]:
                oracle.feed(token)
            self._margins[key] = oracle.min_margin
        return self._margins[key]

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype="float32")
