"""xformers: biases of retained slots, attention under them, and hosts that use it.

Run with `make test-xformers`, in an environment that has it. Without CUDA, xformers has no kernels:
its own biases are then materialised into torch's attention, which is what is tested here.
"""

import pytest
import torch

pytestmark = pytest.mark.xformers

SPECS = (
    "full",
    "window:budget=16",
    "sinks:budget=16,interval=5",
    "h2o:budget=16",
    "h2o:budget=16,interval=4,scope=layer",
    "tova:budget=16",
    "random:budget=16,seed=7",
    "mix:layers=(0:window;1-:h2o),budget=12",
)
B, H, H_KV, D, TOKENS = 2, 4, 2, 16, 80


def draw(*shape, seed=0):
    """Gaussian numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunk(tokens, seed=0):
    """Queries, keys and values of some tokens."""
    return tuple(
        draw(B, heads, tokens, D, seed=seed + i) for i, heads in enumerate((H, H_KV, H_KV))
    )


def by_definition(q, keys, values, visible, scale):
    """Attention of every query over exactly the slots that it sees, in float64."""
    output, lse = torch.empty_like(q, dtype=torch.float64), torch.empty(q.shape[:3])
    group, queries = q.shape[1] // keys.shape[1], q.shape[2]
    for row, count in enumerate(visible):
        for head in range(q.shape[1]):
            for index in range(queries):
                seen = count - queries + index + 1
                k = keys[row, head // group, :seen].double()
                v = values[row, head // group, :seen].double()
                logits = k @ q[row, head, index].double() * scale
                output[row, head, index] = logits.softmax(0) @ v
                lse[row, head, index] = logits.logsumexp(0)
    return output.float(), lse


def storage(visible, capacity):
    """Keys and values of a storage whose unwritten slots hold NaN."""
    keys, values = draw(B, H_KV, capacity, D, seed=3), draw(B, H_KV, capacity, D, seed=4)
    for row, count in enumerate(visible):
        keys[row, :, count:], values[row, :, count:] = torch.nan, torch.nan
    return keys, values


def test_a_bias_is_zero_exactly_where_a_query_sees_a_slot():
    """Each KV head of each row sees its own held slots, its newest tokens causally."""
    import kvpolicy_xformers

    visible, capacity, queries = [5, 7], 8, 3
    bias = kvpolicy_xformers.slot_bias(visible, H_KV, capacity, queries)
    sequences = B * H_KV
    mask = bias.materialize((sequences * queries, sequences * capacity)) == 0
    expected = torch.zeros_like(mask)
    for sequence in range(sequences):
        for query in range(queries):
            last = visible[sequence // H_KV] - queries + query + 1
            first = sequence * capacity
            expected[sequence * queries + query, first : first + last] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("queries", "visible"), [(1, [9, 4]), (1, [1, 12]), (4, [4, 11])])
def test_attention_is_its_definition(queries, visible):
    """Output and log-sum-exp over slots in place, with NaN in those that are not held."""
    import kvpolicy_xformers

    q, (keys, values) = draw(B, H, queries, D), storage(visible, 12)
    output, lse = kvpolicy_xformers.attend(q, keys, values, visible, 0.25)
    expected = by_definition(q, keys, values, visible, 0.25)
    torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=0)


def paged(x, table, block_size, *, heads_first):
    """Scatter [B, H_kv, C, D] into blocks, [N, H_kv, P, D] or [N, P, H_kv, D], NaN elsewhere."""
    blocks = torch.full((int(table.max()) + 3, H_KV, block_size, D), torch.nan)
    for row in range(B):
        for number, block in enumerate(table[row].tolist()):
            blocks[block] = x[row, :, number * block_size : (number + 1) * block_size]
    return blocks if heads_first else blocks.transpose(1, 2).contiguous()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads_first", [True, False])
def test_paged_biases_see_what_unpaged_ones_see(queries, heads_first):
    """Both layouts of a paged cache, with blocks in any order, give the definition's attention."""
    import kvpolicy_xformers

    block_size, visible = 4, [10, 5]
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    q, (keys, values) = draw(B, H, queries, D), storage(visible, 12)
    expected = by_definition(q, keys, values, visible, 0.25)
    k, v = (paged(x, table, block_size, heads_first=heads_first) for x in (keys, values))
    group = H // H_KV
    if heads_first:
        bias = kvpolicy_xformers.block_bias(visible, table, block_size, H_KV, queries)
        packed = q.reshape(B * H_KV, group, queries, D).transpose(1, 2)
        packed = packed.reshape(1, -1, 1, group, D)
        k, v = (x.reshape(1, -1, 1, 1, D).expand(-1, -1, -1, group, -1) for x in (k, v))
    else:
        bias = kvpolicy_xformers.paged_bias(visible, table, block_size, queries)
        packed = q.transpose(1, 2).reshape(1, B * queries, H_KV, group, D)
        k, v = (x.reshape(1, -1, H_KV, 1, D).expand(-1, -1, -1, group, -1) for x in (k, v))
    output, lse = kvpolicy_xformers.attend_packed(packed, k, v, bias, 0.25)
    if heads_first:
        output = output.view(B * H_KV, queries, group, D).transpose(1, 2).reshape(B, H, queries, D)
        lse = lse.view(group, B * H_KV, queries).transpose(0, 1).reshape(B, H, queries)
    else:
        output = output.view(B, queries, H, D).transpose(1, 2)
        lse = lse.view(H, B, queries).transpose(0, 1)
    torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("visible", [[], [0, 3], [3, 13]])
def test_biases_of_impossible_slots_are_refused(visible):
    """No row, a row that does not see its own token, and more slots than there are."""
    import kvpolicy_xformers
    from kvpolicy import PolicyError

    with pytest.raises(PolicyError, match="at most the 12 slots"):
        kvpolicy_xformers.slot_bias(visible, H_KV, 12)


def test_parts_merge_by_their_log_sum_exp():
    """Attention to two halves of the slots, merged by log-sum-exp, is attention to all."""
    import kvpolicy_xformers

    q, (keys, values) = draw(B, H, 1, D), storage([12, 12], 12)
    halves = [
        kvpolicy_xformers.attend(q, keys[:, :, part], values[:, :, part], [6, 6], 0.25)
        for part in (slice(0, 6), slice(6, 12))
    ]
    lse = torch.stack([half.lse for half in halves])
    shares = lse.softmax(dim=0)[..., None]
    merged = (torch.stack([half.output for half in halves]) * shares).sum(dim=0)
    whole = kvpolicy_xformers.attend(q, keys, values, [12, 12], 0.25)
    torch.testing.assert_close(merged, whole.output, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.logsumexp(dim=0), whole.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [40, 1, 39]], ids=len)
@pytest.mark.parametrize("spec", SPECS)
def test_a_loop_of_ones_own_equals_the_engine(spec, sizes):
    """PolicyAttention has the core's outputs, sets and ledger, in any chunking."""
    import kvpolicy_xformers
    from kvpolicy import parse
    from kvpolicy.attention import AttentionLayer
    from kvpolicy.engine import step

    q, k, v = chunk(TOKENS)
    layer = AttentionLayer(parse(spec), 3, D**-0.5)
    slots = layer.new_slots(q, k, v)
    outputs = [step(layer, slots, *(x[:, :, n] for x in (q, k, v))) for n in range(TOKENS)]
    attention = kvpolicy_xformers.PolicyAttention(spec, layer=3)
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    answers = [attention(*part) for part in parts]
    output = torch.cat([answer.output for answer in answers], dim=2)
    torch.testing.assert_close(output, torch.stack(outputs, dim=2), atol=1e-5, rtol=0)
    assert torch.cat([answer.lse for answer in answers], dim=2).shape == (B, H, TOKENS)
    for row in range(B):
        held = slots.tokens[row] - slots.evicted[row]
        expected = slots.positions[row, :, :held].sort(-1).values
        assert torch.equal(attention.retained_positions(row), expected)
        ledger = attention.ledger(row)
        assert (ledger.retained, ledger.evicted) == (held, slots.evicted[row])


@pytest.mark.parametrize("spec", SPECS)
def test_a_policy_cache_with_xformers_equals_one_without(spec):
    """The model's logits and every layer's retained positions are the same, padding included."""
    import kvpolicy_xformers
    from fixtures.caches import small_llama
    from kvpolicy_hf import PolicyCache

    model = small_llama()
    ids = torch.arange(60).reshape(2, 30) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for kernel in (None, kvpolicy_xformers.attend):
        cache = PolicyCache(model, spec, kernel=kernel)
        with torch.no_grad():
            logits = [model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]]
            for n in range(6):
                mask_now = torch.cat([mask, torch.ones(2, n + 1, dtype=mask.dtype)], dim=1)
                token = torch.full((2, 1), n + 1)
                step = model(token, attention_mask=mask_now, past_key_values=cache)
                logits.append(step.logits[:, -1])
        sets = [
            cache.retained_positions(layer, row)
            for layer in range(model.config.num_hidden_layers)
            for row in range(2)
        ]
        found.append((torch.stack(logits), sets))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    pairs = zip(found[0][1], found[1][1], strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_what_a_loop_cannot_do_is_refused():
    """Memories, reindexing, prompts of unknown length, other rows and other shapes."""
    import kvpolicy_xformers
    from kvpolicy import PolicyError, UnsupportedError

    for spec in ("centroid:budget=16,slots=4", "sinks:budget=16,rope=reindex"):
        with pytest.raises(UnsupportedError):
            kvpolicy_xformers.PolicyAttention(spec)
    with pytest.raises(PolicyError, match="say how long it is"):
        kvpolicy_xformers.PolicyAttention("h2o:budget=16,prefill=bulk")
    attention = kvpolicy_xformers.PolicyAttention("window:budget=16")
    with pytest.raises(PolicyError, match="there is no row 0"):
        attention.ledger()
    attention(*chunk(4))
    with pytest.raises(PolicyError, match="of the rows seen so far"):
        attention(*(x[:1] for x in chunk(4)))
    assert attention.ledger().logical_tokens == 4


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 4])
def test_kernels_compute_what_the_biases_say(queries):
    """On CUDA, xformers' kernels give the definition's output and log-sum-exp in half precision."""
    import kvpolicy_xformers

    visible = [9, 40]
    q, (keys, values) = draw(B, H, queries, 64), (draw(B, H_KV, 48, 64), draw(B, H_KV, 48, 64))
    expected = by_definition(q, keys, values, visible, 0.125)
    half = [x.half().cuda() for x in (q, keys, values)]
    output, lse = kvpolicy_xformers.attend(*half, visible, 0.125)
    torch.testing.assert_close(output.float().cpu(), expected[0], atol=5e-3, rtol=0)
    torch.testing.assert_close(lse.cpu(), expected[1], atol=5e-3, rtol=0)
