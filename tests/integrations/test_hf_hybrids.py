"""Models of which some layers attend to a sliding window: the policy rules the others only."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from fixtures.families import HYBRIDS, WINDOW
from fixtures.models import CertifiedPrompt, certified_prompts, random_prompt
from kvpolicy import KVPolicyError, PolicyError, UnsupportedError
from kvpolicy.model_facts import windows_of
from kvpolicy_hf import PolicyCache
from oracles.modules import ModuleOracle

NEW = 12
LENGTHS = (3, 15, 16, 30, WINDOW, WINDOW + 1, 60)
SPECS = (
    "full",
    "window:budget=16,interval=3",
    "h2o:budget=16",
    "tova:budget=16",
    "random:budget=16",
    "snapkv:budget=16,window=8",
)
TOLERANCE = 1e-3
"""On logits of a few units; float32 noise reaches 1e-4."""


@cache
def model(family: str = "gemma3") -> PreTrainedModel:
    """Build a small model with layers of both kinds."""
    return HYBRIDS[family]()


@cache
def certified(family: str, spec: str) -> list[CertifiedPrompt]:
    """Find prompts of unequal lengths, some longer than the window, on which float32 decides."""
    return certified_prompts(model(family), [spec], LENGTHS, max_new_tokens=NEW)


def ruled(used: PreTrainedModel) -> list[int]:
    """Layers under the policy."""
    return [index for index, window in enumerate(windows_of(used.config)) if window is None]


def retained(past: PolicyCache, row: int = 0, family: str = "gemma3") -> list[Any]:
    """What the layers under the policy hold of a row, as the oracle says it."""
    sets = [past.retained_positions(layer, row).tolist() for layer in ruled(model(family))]
    return [tuple(tuple(head) for head in layer) for layer in sets]


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out rows with padding in front; ids and attention mask."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def feed(past: PolicyCache | DynamicCache, ids: list[int], **arguments: Any) -> torch.Tensor:
    """Feed one chunk of tokens; the logits after each."""
    return model()(torch.tensor([ids]), past_key_values=past, **arguments).logits[0]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_left_padded_batch_equals_the_oracle(family: str, spec: str, chunk: int | None) -> None:
    """Proves rows shorter and longer than budget and window do what they do alone, in chunks."""
    expected, used = certified(family, spec), model(family)
    ids, mask = left_padded([prompt.ids for prompt in expected])
    lengths = None if chunk is None else [len(prompt.ids) for prompt in expected]
    past = PolicyCache(used, spec, prompt_tokens=lengths)
    out = used.generate(
        ids,
        attention_mask=mask,
        past_key_values=past,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        prefill_chunk_size=chunk,
    )
    for row, prompt in enumerate(expected):
        assert out[row, -NEW:].tolist() == prompt.run.tokens
        assert retained(past, row, family) == prompt.run.retained
        assert past.ledger(row).logical_tokens == len(prompt.ids) + NEW - 1


@pytest.mark.parametrize("spec", ["h2o:budget=16", "tova:budget=16,interval=4"])
def test_every_token_gives_the_oracles_logits_and_sets(spec: str) -> None:
    """Proves equality after each token, on either side of the window's length."""
    [prompt] = certified_prompts(model(), [spec], [50], max_new_tokens=NEW)
    past, oracle = PolicyCache(model(), spec), ModuleOracle(model(), spec)
    for token in prompt.ids + prompt.run.tokens[:-1]:
        np.testing.assert_allclose(feed(past, [token])[0], oracle.feed(token), atol=TOLERANCE)
        assert retained(past) == oracle.retained


def test_full_equals_the_dynamic_cache() -> None:
    """Proves sliding layers are transformers' own, whatever the chunks."""
    ids = random_prompt(model(), 100, 0)
    past, theirs = PolicyCache(model(), "full"), DynamicCache(config=model().config)
    for first, last in ((0, 20), (20, 21), (21, 70), (70, 71), (71, 100)):
        expected = feed(theirs, ids[first:last])
        torch.testing.assert_close(feed(past, ids[first:last]), expected, atol=1e-4, rtol=0)


def test_the_eager_implementation_slides_as_well() -> None:
    """Proves the masks of a model that was eager before hide what left the window."""
    eager, ids = HYBRIDS["gemma3"](), torch.tensor([random_prompt(model(), 90, 0)])
    eager.set_attn_implementation("eager")
    past = PolicyCache(eager, "h2o:budget=16")
    with torch.no_grad():
        logits = eager(ids, past_key_values=past).logits[0]
    expected = feed(PolicyCache(model(), "h2o:budget=16"), ids[0].tolist())
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def causal(queries: int) -> torch.Tensor:
    """Make a 4D mask that hides one more token than causality does."""
    mask = torch.ones(1, 1, queries, queries, dtype=torch.bool).tril()
    mask[..., 2, 0] = False
    return mask


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "short mask": ({"attention_mask": torch.ones(1, 3)}, "covers 3 columns"),
    "unknown effect": ({"softcap": 30.0}, r"asks for \['softcap'\]"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
    "other rows": ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "holds 1 rows"),
    "padding between": (
        {"attention_mask": torch.tensor([[1] * 50 + [0, 1, 1]])},
        "row 0 has padding between its tokens",
    ),
    "padding behind": (
        {"attention_mask": torch.tensor([[1] * 50 + [1, 1, 0]])},
        "row 0 has padding between its tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@torch.no_grad()
def test_a_refused_forward_is_taken_back_from_sliding_layers(kind: str) -> None:
    """Proves layers before the one that refuses give back what they took."""
    arguments, message = REFUSED[kind]
    ids = random_prompt(model(), 60, 1)
    past, other = (PolicyCache(model(), "h2o:budget=16") for _ in range(2))
    for cache_ in (past, other):
        feed(cache_, ids[:50])
    before = past.ledger().as_dict()
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=message):
            model()(**{"input_ids": torch.tensor([[1, 2, 3]])} | arguments, past_key_values=past)
    assert past.ledger().as_dict() == before
    assert past.get_seq_length() == 50
    torch.testing.assert_close(feed(past, ids[50:]), feed(other, ids[50:]), atol=0, rtol=0)


@torch.no_grad()
def test_a_refused_first_forward_leaves_a_new_cache() -> None:
    """Proves nothing of it is seen by the tokens that follow."""
    past = PolicyCache(model(), "h2o:budget=16")
    with pytest.raises(UnsupportedError, match="softcap"):
        feed(past, [5, 6, 7], softcap=30.0)
    ids = random_prompt(model(), 60, 1)
    expected = feed(PolicyCache(model(), "h2o:budget=16"), ids)
    torch.testing.assert_close(feed(past, ids), expected, atol=0, rtol=0)


def test_a_forward_that_fails_between_layers_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proves a cache whose layers differ in length refuses to go on until it is reset."""
    ids = random_prompt(model(), 60, 1)
    past = PolicyCache(model(), "h2o:budget=16")
    feed(past, ids[:50])
    last: Any = model().get_decoder().layers[-1]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(last.mlp, "forward", fail)
        patch.setattr(last.self_attn, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            feed(past, ids[50:])
    with pytest.raises(KVPolicyError, match="failed midway"):
        feed(past, ids[50:])
    past.reset()
    expected = feed(PolicyCache(model(), "h2o:budget=16"), ids)
    torch.testing.assert_close(feed(past, ids), expected, atol=0, rtol=0)


@torch.no_grad()
def test_ledgers_count_either_kind_of_layers_as_what_it_is() -> None:
    """Proves tokens are those of ruled layers, bytes those of all, and savings against full."""
    cell = 2 * 2 * 32 * 4  # key and value, two KV heads of 32 numbers, float32
    past, full = PolicyCache(model(), "window:budget=16"), PolicyCache(model(), "full")
    ids = torch.tensor([random_prompt(model(), 60, seed) for seed in range(3)])
    for cache_ in (past, full):
        model()(ids, past_key_values=cache_)
    ledger = past.ledger(1)
    assert (ledger.retained, ledger.evicted, ledger.slots_held) == (16, 44, 16)
    rows = [slots for layer in past._policy_layers if (slots := layer.slots) is not None]
    budgeted = sum(slots.num_bytes for slots in rows) // 3
    assert ledger.bytes_held == budgeted + 4 * (WINDOW - 1) * cell
    assert ledger.bytes_saved == 2 * 60 * cell - budgeted
    assert full.ledger(1).bytes_held >= (2 * 60 + 4 * (WINDOW - 1)) * cell


def test_sliding_layers_have_no_retained_positions() -> None:
    """Proves asking for them says which layers have some."""
    past = PolicyCache(model(), "window:budget=16")
    feed(past, [1, 2, 3])
    with pytest.raises(PolicyError, match=r"layer 0 attends to a sliding window.*are 1, 4"):
        past.retained_positions(0)
    assert past.retained_positions(4).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda past: past.crop(-1), "crop"),
        (lambda past: past.reorder_cache(torch.tensor([0])), "beam search"),
        (lambda past: past.batch_repeat_interleave(2), "batch_repeat_interleave"),
        (lambda past: past.batch_select_indices(torch.tensor([0])), "batch_select_indices"),
    ],
    ids=["crop", "beams", "repeat", "select"],
)
def test_refused_operations_leave_sliding_layers_alone(operation: Any, message: str) -> None:
    """Proves the layer that comes first is not changed before another one refuses."""
    ids = random_prompt(model(), 60, 1)
    past, other = (PolicyCache(model(), "h2o:budget=16") for _ in range(2))
    for cache_ in (past, other):
        feed(cache_, ids[:50])
    with pytest.raises(UnsupportedError, match=message):
        operation(past)
    torch.testing.assert_close(feed(past, ids[50:]), feed(other, ids[50:]), atol=0, rtol=0)


def test_copies_go_on_independently() -> None:
    """Proves a copy shares no sliding layer with its original."""
    ids = random_prompt(model(), 80, 1)
    past = PolicyCache(model(), "h2o:budget=16")
    feed(past, ids[:50])
    twin = copy.deepcopy(past)
    feed(past, random_prompt(model(), 30, 2))
    expected = feed(PolicyCache(model(), "h2o:budget=16"), ids)[50:]
    torch.testing.assert_close(feed(twin, ids[50:]), expected, atol=1e-4, rtol=0)


def test_a_cache_filled_in_inference_mode_goes_on_outside_it() -> None:
    """Proves sliding layers keep no tensors that later forwards cannot use."""
    ids, past = random_prompt(model(), 60, 1), PolicyCache(model(), "h2o:budget=16")
    with torch.inference_mode():
        feed(past, ids[:50])
    logits = model()(torch.tensor([ids[50:]]), past_key_values=past).logits
    with pytest.raises(UnsupportedError, match="no gradients"):
        logits.sum().backward()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sinks:budget=16,rope=reindex", "rope=reindex lets texts go on past"),
        ("infini:segment=8,gate=0.5", "memories are not tested beside"),
        ("compressive:budget=16", "memories are not tested beside"),
    ],
)
def test_policies_for_all_layers_are_refused(spec: str, message: str) -> None:
    """Proves what was not shown to be right beside sliding layers does not run."""
    with pytest.raises(UnsupportedError, match=message):
        PolicyCache(model(), spec)
