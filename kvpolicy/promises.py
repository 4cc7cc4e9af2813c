"""The promises that every retention policy makes, each as a check that can be run.

A check is a plain function of a policy and a ``Case`` (``kvpolicy.rehearsal``); its docstring is
the promise. ``kvpolicy.testing`` draws cases and runs them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from kvpolicy.agreement import (
    TOLERANCE,
    causal_attention,
    is_close,
    is_equal,
    require,
    require_same,
)
from kvpolicy.errors import ContractError, KVPolicyError, PolicyError
from kvpolicy.policy import (
    NEEDS,
    CachePolicy,
    EvictionPolicy,
    GuardedPolicy,
    parameters,
)
from kvpolicy.questions import (
    decisions,
    gathered,
    mapped,
    questions,
    settings_of_torch,
    slot_tensors,
    vectors,
    with_rubbish,
)
from kvpolicy.registry import parse
from kvpolicy.rehearsal import (
    Case,
    Host,
    PlannedFailure,
    Row,
    by_chunks,
    by_steps,
    reference,
)
from kvpolicy.selection import check_scores


def is_a_value(policy: CachePolicy, _: Case) -> None:
    """A policy is frozen and hashable, and its canonical spec parses back to it."""
    spec = str(policy)
    try:
        again = parse(spec)
    except PolicyError as error:
        raise ContractError(
            f"its spec {spec!r} does not parse back: {error}; define the class at the top level "
            "of an importable module, or register it"
        ) from error
    require(again == policy, f"its spec {spec!r} parses back to something else: {again!r}")
    require(hash(again) == hash(policy), "equal policies have different hashes")
    require(str(again) == spec, f"its spec changes when it is parsed: {spec!r}, then {again}")
    for parameter in parameters(type(policy)).values():
        name = parameter.attribute
        try:
            setattr(policy, name, getattr(policy, name))
        except AttributeError:
            continue
        raise ContractError(f"{name} can be assigned; state belongs to the host")


def runs_on_what_it_declares(policy: CachePolicy, case: Case) -> None:
    """Everything the policy looks at is declared in `needs`; the rest it is not shown."""
    unknown = set(policy.needs) - set(NEEDS)
    require(not unknown, f"unknown needs {sorted(unknown)}; choose from {NEEDS}")
    try:
        reference(policy, case)
    except KVPolicyError:
        raise
    except Exception as error:
        raise ContractError(
            f"it failed when shown positions and needs={policy.needs}: "
            f"{type(error).__name__}: {error}; what is not declared in `needs` is None"
        ) from error


def scores_can_be_ordered(policy: CachePolicy, case: Case) -> None:
    """Scores are real numbers in the shape and on the device of the view's positions."""
    for made in decisions(policy, case):
        scores, positions = made.scores, made.view.positions
        require(
            scores.shape == positions.shape,
            f"scores must be [B, H_kv, S] = {tuple(positions.shape)}, got {tuple(scores.shape)}",
        )
        require(not scores.is_complex(), f"scores must be real, got {scores.dtype}")
        require(scores.device == positions.device, f"scores moved to {scores.device}")


def leaves_the_view_alone(policy: CachePolicy, case: Case) -> None:
    """score() and observe() compute; they change nothing that they are shown."""
    for made in decisions(policy, case):
        for ask in questions(policy, case):
            shown = mapped(made.view, lambda x: x.clone())
            ask(shown)
            for name, before in slot_tensors(made.view):
                require(
                    is_equal(getattr(shown, name), before),
                    f"{ask.__name__}() changed view.{name} in place; make a new tensor",
                )


def takes_half_precision(policy: CachePolicy, case: Case) -> None:
    """Keys and values in bfloat16 and float16, as models cache them, get scores like others."""
    if not {"keys", "values"} & {*policy.needs}:
        return
    for made in decisions(policy, case):
        for dtype in (torch.bfloat16, torch.float16):
            halves = {name: x.to(dtype) for name, x in vectors(made.view).items()}
            view = replace(made.view, **halves)
            for ask in questions(policy, case):
                try:
                    check_scores(made.policy, ask(view), view, ask.__name__)
                except Exception as error:
                    raise ContractError(
                        f"with keys and values in {str(dtype).removeprefix('torch.')} "
                        f"{ask.__name__}() fails: {type(error).__name__}: {error}; "
                        "compute with .float()"
                    ) from error


def leaves_the_host_alone(policy: CachePolicy, case: Case) -> None:
    """score() and observe() draw no random numbers of torch's and change none of its settings."""
    for made in decisions(policy, case, most=1):
        for ask in questions(policy, case):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((1 << 40) + case.seed)
                before = settings_of_torch()
                ask(made.view)
                changed = [name for name, x in settings_of_torch().items() if x != before[name]]
            require(
                not changed,
                f"{ask.__name__}() changed {', '.join(changed)}, which the host samples and "
                "computes with; use a torch.Generator of your own",
            )


def holds_what_the_law_says(policy: CachePolicy, case: Case) -> None:
    """After every token exactly as many slots are held as the occupancy law says."""
    law, most = policy.occupancy, getattr(policy, "budget", None)
    if most is not None and law.retained is not None:
        require(law.retained + law.state_slots <= most, f"the law keeps more than budget={most}")
    run = reference(policy, case)
    for index, retained in enumerate(run.retained):
        prompt = case.prompt(index)
        beside, bulk = (prompt if law.prompts == mode else 0 for mode in ("keep", "bulk"))
        held = 0
        for n in sorted(retained):
            held += 1
            if law.retained is not None and n >= bulk and held >= law.retained + beside:
                over = n == bulk or held == law.retained + beside + law.interval
                held = law.retained + beside if over else held
            counts = {len(positions) for positions in retained[n]}
            require(
                counts == {held}, f"row {index} holds {counts} slots after {n} tokens, not {held}"
            )


def keeps_what_is_protected(policy: CachePolicy, case: Case) -> None:
    """Sinks, recent tokens, pinned spans and a kept prompt are held after every token."""
    if not isinstance(policy, EvictionPolicy):
        return
    sinks, recent = _declared(policy)
    run = reference(policy, case)
    for index, retained in enumerate(run.retained):
        for n, kept in retained.items():
            wanted = {*range(sinks), *range(max(0, n - recent), n)}
            wanted.update(*(range(*span) for span in policy.spans))
            wanted.update(range(case.prompt(index) if policy.keeps_prompt else 0))
            wanted &= {*range(n)}
            for head, positions in enumerate(kept):
                lost = sorted(wanted - {*positions})
                require(not lost, f"row {index}, KV head {head} lost {lost} after {n} tokens")


def forgets_for_good(policy: CachePolicy, case: Case) -> None:
    """Retained positions are distinct, within range, and were held before or are new."""
    for retained in reference(policy, case).retained:
        before: list[set[int]] = [set() for _ in range(case.kv_heads)]
        for n, kept in sorted(retained.items()):
            for head, positions in enumerate(kept):
                require(len({*positions}) == len(positions), f"a position twice: {positions}")
                strange = {*positions} - before[head] - {n - 1}
                require(not strange, f"after {n} tokens {sorted(strange)} came from nowhere")
            before = [{*positions} for positions in kept]


def keeps_one_set_under_layer_scope(policy: CachePolicy, case: Case) -> None:
    """With scope=layer all KV heads of a layer hold the same positions."""
    if isinstance(policy, EvictionPolicy) and policy.scope_is_layer:
        for retained in reference(policy, case).retained:
            for n, kept in retained.items():
                require(len({*kept}) == 1, f"after {n} tokens the heads hold {kept}")


def answers_the_same_again(policy: CachePolicy, case: Case) -> None:
    """The same input gives the same answer, bit by bit, whatever was asked in between."""
    first = reference(policy, case)
    by_steps(policy, replace(case, seed=case.seed + 1))
    second = by_steps(policy, case)
    require(first.retained == second.retained, "a second run kept other positions")
    same = map(torch.equal, first.outputs, second.outputs)
    require(all(same), "a second run gave other outputs")


def is_the_same_in_any_chunking(policy: CachePolicy, case: Case) -> None:
    """Look-ahead over chunks equals one token at a time, in outputs and sets."""
    require_same(reference(policy, case), by_chunks(policy, case), "in chunks")


def rows_do_not_interact(policy: CachePolicy, case: Case) -> None:
    """A row alone equals the same row in a batch of unequal lengths."""
    batch = reference(policy, case)
    for index, row in enumerate(case.rows()):
        alone = by_steps(policy, case.alone(index), [row])
        require_same(alone, batch.row(index), f"as row {index} of a batch")


def nan_stays_in_its_row(policy: CachePolicy, case: Case) -> None:
    """Inputs that are not numbers spoil their own row and no other."""
    rows = case.rows()
    bad = case.seed % rows[0].length
    for x in rows[0]:
        x[:, bad] = torch.nan
    spoilt, clean = by_steps(policy, case, rows), reference(policy, case)
    for index in range(1, len(rows)):
        require_same(clean.row(index), spoilt.row(index), "beside a row with NaN")


def heads_do_not_interact(policy: CachePolicy, case: Case) -> None:
    """With scope=head a KV head decides alone what it decides among others."""
    if not isinstance(policy, EvictionPolicy) or policy.scope_is_layer:
        return
    row = case.rows()[0]
    together = reference(policy, case).row(0)
    for head in range(case.kv_heads):
        heads, queries = slice(head, head + 1), slice(head * case.group, (head + 1) * case.group)
        part = Row(row.q[queries], row.k[heads], row.v[heads])
        alone = by_steps(policy, case, [part], first_kv_head=head)
        require_same(alone, together.row(0, heads, queries), f"as KV head {head}")


def equal_query_heads_count_once(policy: CachePolicy, case: Case) -> None:
    """A group of equal query heads decides like one of them: GQA is MHA at group size 1."""
    if isinstance(policy, EvictionPolicy) and policy.group_reduction == "sum":
        return
    row = case.rows()[0]
    one = row._replace(q=row.q[:: case.group])
    many = row._replace(q=one.q.repeat_interleave(case.group, dim=0))
    grouped = by_steps(policy, case, [many]).row(0, queries=slice(None, None, case.group))
    require_same(by_steps(policy, case, [one]), grouped, f"in groups of {case.group}")


def copied_kv_heads_decide_alike(policy: CachePolicy, case: Case) -> None:
    """With scope=layer, giving every query head its own copy of the KV head changes nothing."""
    if not isinstance(policy, EvictionPolicy) or not policy.scope_is_layer:
        return
    row = case.rows()[0]
    copies = (x.repeat_interleave(case.group, dim=0) for x in (row.k, row.v))
    copied = by_steps(policy, case, [Row(row.q, *copies)])
    shared = slice(None, None, case.group)
    require_same(reference(policy, case).row(0), copied.row(0, shared), "with copied KV heads")


def slot_order_means_nothing(policy: CachePolicy, case: Case) -> None:
    """Permuting the slots permutes the scores."""
    for made in decisions(policy, case):
        generator = torch.Generator().manual_seed(case.seed)
        order = torch.rand(made.view.positions.shape, generator=generator).argsort(dim=-1)
        if made.policy.scope_is_layer:
            order = order[:, :1].expand_as(order)
        shuffled = mapped(made.view, lambda x, at=order: gathered(x, at))
        for ask in questions(policy, case):
            require(
                is_close(ask(shuffled), gathered(ask(made.view), order), shuffled.valid),
                f"{ask.__name__}() depends on the order of slots; look at view.positions instead",
            )


def unheld_slots_mean_nothing(policy: CachePolicy, case: Case) -> None:
    """Slots that are not valid influence no valid one, whatever they hold."""
    for made in decisions(policy, case):
        held = made.view.positions.shape[-1]
        wider = with_rubbish(made.view)
        for ask in questions(policy, case):
            require(
                is_close(ask(wider)[..., :held], ask(made.view), made.view.valid),
                f"{ask.__name__}() depends on slots that are not held; hide them with "
                "torch.where(view.valid, ...), because 0 x NaN is NaN",
            )


def a_failure_changes_nothing(policy: CachePolicy, case: Case) -> None:
    """When score() fails, the slots stay as they were, and the step can be taken again."""
    row = case.rows()[0]
    num_decisions = sum(index == 0 for index, _ in reference(policy, case).decisions)
    if num_decisions == 0:
        return
    for size in (0, case.chunks[0]):
        host = Host(policy, case, [row])
        host.notes.fail_at = case.seed % num_decisions
        while not host.is_done(0):
            before = host.state()
            try:
                host.extend(0, size) if size else host.step([0])
            except PlannedFailure:
                require(before.equals(host.state()), "a failed call changed the slots")
                host.notes.fail_at = None
        again = by_steps(policy, case, [row])
        require_same(again, host.run, "after a failure")


def no_tokens_change_nothing(policy: CachePolicy, case: Case) -> None:
    """A chunk without tokens, at any time, changes nothing and fails nowhere."""
    row = case.rows()[0]
    host = Host(policy, case, [row])
    for size in (0, case.chunks[0], 0, row.length):
        before = host.state()
        host.extend(0, size)
        require(size > 0 or before.equals(host.state()), "no tokens changed the slots")


def attends_densely_within_its_budget(policy: CachePolicy, case: Case) -> None:
    """As long as nothing has been evicted, outputs are those of causal attention."""
    run = reference(policy, case)
    for index, row in enumerate(case.rows()):
        first_eviction = policy.occupancy.of_prompt(case.prompt(index)).next_due(0)
        length = row.length if first_eviction is None else min(row.length, first_eviction)
        expected = causal_attention(row.first(length))
        error = (run.outputs[index][:, :length] - expected).abs().max().item()
        require(error <= TOLERANCE, f"row {index} is off dense attention by {error:.2g}")


Check = Callable[[CachePolicy, Case], None]

CONTRACT: tuple[Check, ...] = (
    is_a_value,
    runs_on_what_it_declares,
    scores_can_be_ordered,
    leaves_the_view_alone,
    leaves_the_host_alone,
    takes_half_precision,
    holds_what_the_law_says,
    keeps_what_is_protected,
    forgets_for_good,
    keeps_one_set_under_layer_scope,
    answers_the_same_again,
    is_the_same_in_any_chunking,
    rows_do_not_interact,
    nan_stays_in_its_row,
    heads_do_not_interact,
    equal_query_heads_count_once,
    copied_kv_heads_decide_alike,
    slot_order_means_nothing,
    unheld_slots_mean_nothing,
    a_failure_changes_nothing,
    no_tokens_change_nothing,
    attends_densely_within_its_budget,
)
"""Every check, cheap and telling ones first. A check's docstring is its promise."""


def _declared(policy: EvictionPolicy) -> tuple[int, int]:
    """First and newest tokens that stay: by its properties, or by its keys if these say more."""
    sinks, recent = policy.sink_slots, policy.recent_slots
    if isinstance(policy, GuardedPolicy):
        sinks = max(sinks, policy.sinks)
        recent = max(recent, GuardedPolicy.recent_slots.__get__(policy))
    return sinks, recent
