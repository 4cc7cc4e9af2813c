"""Capture: traces hold what attention really saw, and the model never notices."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fixtures.models import (
    SMALL_SHAPE,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
    save_model,
)
from kvpolicy import PolicyError, TraceError, UnsupportedError
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Trace
from kvpolicy.trace.recover import repair
from kvpolicy_hf import PolicyCache
from kvpolicy_sim.capture import bytes_per_token, capture, plan
from kvpolicy_sim.interception import listening
from oracles.dense import replay_layer

TOKENS = 70


def random_qwen2():
    """A small Qwen2, the family with biases on queries, keys and values."""
    return redrawn(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL_SHAPE)))


def random_granite():
    """A small Granite, whose logits have a scale of their own."""
    config = transformers.GraniteConfig(**SMALL_SHAPE, attention_multiplier=0.1)
    return redrawn(transformers.GraniteForCausalLM(config))


def random_gpt2():
    """A small GPT-2: learned positions and no rotation."""
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 512}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return redrawn(transformers.GPT2LMHeadModel(config))


def redrawn(model):
    """Make a model's attention peaked."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.12, generator=generator)
    return model.eval()


TESTED = (random_llama, random_qwen3, random_mistral, random_gemma, random_qwen2)
OTHERS = (random_granite, random_gpt2)


def prompt(model, length=TOKENS, seed=0):
    """Random token ids, [T]."""
    return torch.tensor(random_prompt(model, length, seed))


def everything(trace):
    """All that a trace holds, by sequence, layer and kind."""
    return {
        (sequence.index, layer, kind): trace.read(kind, layer, sequence.index)
        for sequence in trace.sequences
        for layer in trace.header.layers
        for kind in ("q", "k", "v", "lse", "out")
        if trace.has(kind, layer, sequence.index)
    }


def token_ids(trace, sequence=0):
    """The ids that were recorded."""
    return trace.read("tokens", None, sequence).tolist()


def dense_lse(q, k, scale):
    """Log-sum-exp of causal attention in float64, [H, T]."""
    q, k = q.double().numpy(), k.double().numpy()
    k = np.repeat(k, len(q) // len(k), axis=0)
    logits = np.einsum("htd,hsd->hts", q, k) * scale
    logits[:, ~np.tri(q.shape[1], dtype=bool)] = -np.inf
    top = logits.max(axis=-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))


# --- what is recorded -------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [*TESTED, *OTHERS])
def test_recorded_tensors_give_the_recorded_results(make, implementation, tmp_path):
    """Attention over q, k, v in float64, written from the definition, gives out and lse.

    A wrong group of query heads, position, scale or chunk would show here.
    """
    model = make()
    model.set_attn_implementation(implementation)
    trace = capture(model, prompt(model), tmp_path / "t.kvtrace", chunk=32, new_tokens=3)
    assert trace.sequences[0].tokens == TOKENS + 3
    for layer in trace.header.layers:
        q, k, v, lse, out = (trace.read(kind, layer) for kind in ("q", "k", "v", "lse", "out"))
        dense = replay_layer("full", q, k, v, scale=trace.header.scale)
        np.testing.assert_allclose(out, dense.outputs, atol=3e-5)
        np.testing.assert_allclose(lse, dense_lse(q, k, trace.header.scale), atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", TESTED)
def test_keys_and_values_are_those_of_the_cache_bit_for_bit(make, dtype, tmp_path):
    """What transformers' own cache holds after the same chunks is what is in the file."""
    model = make().to(dtype)
    ids = prompt(model)
    trace = capture(model, ids, tmp_path / "t.kvtrace", chunk=32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in ids.split(32):
            model(part[None], past_key_values=cache)
    assert trace.header.dtype == str(dtype).removeprefix("torch.")
    for layer in trace.header.layers:
        for kind, held in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            recorded = trace.read(kind, layer)
            assert recorded.dtype == dtype
            assert torch.equal(recorded, held[0])


def test_bfloat16_queries_and_outputs_are_the_attention_functions_own(tmp_path):
    """Queries and outputs reach the file without rounding: equal bits, in every head."""
    model = random_llama(**SMALL_SHAPE).bfloat16()
    ids, calls = prompt(model), []
    with torch.no_grad(), listening(model, calls.append):
        model(ids[None])
    trace = capture(model, ids, tmp_path / "t.kvtrace")
    for call in calls:
        assert torch.equal(trace.read("q", call.layer), call.q[0])
        assert torch.equal(trace.read("out", call.layer), call.out[0])
        lse = dense_lse(trace.read("q", call.layer), trace.read("k", call.layer), call.scale)
        assert trace.read("lse", call.layer).dtype == torch.float32
        np.testing.assert_allclose(trace.read("lse", call.layer), lse, atol=3e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_chunks_change_nothing_but_noise(chunk, tmp_path):
    """A trace does not depend on how the model was fed."""
    model = random_llama(**SMALL_SHAPE)
    whole = everything(capture(model, prompt(model), tmp_path / "a.kvtrace", chunk=TOKENS))
    parts = everything(capture(model, prompt(model), tmp_path / "b.kvtrace", chunk=chunk))
    assert whole.keys() == parts.keys()
    for place, expected in whole.items():
        torch.testing.assert_close(parts[place], expected, atol=2e-4, rtol=1e-3)


def test_rows_are_sequences_of_their_own(tmp_path):
    """Each row gives what it gives alone, whether rows come as a batch or as a list."""
    model = random_llama(**SMALL_SHAPE)
    rows = [prompt(model, length, seed) for seed, length in enumerate((40, 40, 23))]
    batch = capture(model, torch.stack(rows[:2]), tmp_path / "batch.kvtrace")
    ragged = capture(model, rows, tmp_path / "list.kvtrace")
    assert [s.tokens for s in batch.sequences] == [40, 40]
    assert [s.tokens for s in ragged.sequences] == [40, 40, 23]
    for index, row in enumerate(rows):
        alone = everything(capture(model, row, tmp_path / "alone.kvtrace"))
        for trace in (batch, ragged):
            if index >= len(trace.sequences):
                continue
            found = everything(trace)
            for (_, layer, kind), expected in alone.items():
                assert torch.equal(found[index, layer, kind], expected)


def test_sampling_records_the_same_numbers_as_a_full_capture(tmp_path):
    """Layers, heads and every third query are exactly those of the trace of everything."""
    model = random_llama(
        num_hidden_layers=3, hidden_size=192, num_attention_heads=6, num_key_value_heads=3
    )
    ids = prompt(model)
    whole = capture(model, ids, tmp_path / "whole.kvtrace", chunk=16)
    part = capture(
        model,
        ids,
        tmp_path / "part.kvtrace",
        chunk=16,
        layers=[2, 0, 0],
        kv_heads=[2, 0],
        query_stride=3,
    )
    assert (part.header.layers, part.header.kv_heads) == ((0, 2), (0, 2))
    assert (part.header.group, part.header.num_kv_heads, part.header.num_layers) == (2, 3, 3)
    for layer in (0, 2):
        for kind in ("q", "out"):
            expected = whole.read(kind, layer)[[0, 1, 4, 5]][:, ::3]
            assert torch.equal(part.read(kind, layer), expected)
        for kind in ("k", "v"):
            assert torch.equal(part.read(kind, layer), whole.read(kind, layer)[[0, 2]])
        # Computed here from fewer rows at a time, which may round otherwise.
        lse = whole.read("lse", layer)[[0, 1, 4, 5]][:, ::3]
        torch.testing.assert_close(part.read("lse", layer), lse, atol=1e-5, rtol=1e-6)
    assert token_ids(part) == token_ids(whole) == ids.tolist()
    heads = capture(model, ids, tmp_path / "heads.kvtrace", chunk=16, layers=[1], kv_heads=[1])
    for kind in ("q", "k", "v", "lse", "out"):
        rows = [2, 3] if heads.header.num_heads(kind) == 2 else [1]
        assert torch.equal(heads.read(kind, 1), whole.read(kind, 1)[rows])


def test_kinds_can_be_left_out(tmp_path):
    """Without outputs, log-sum-exps and ids the rest is the same; the size is as announced."""
    model = random_llama(**SMALL_SHAPE)
    ids = prompt(model, 512)
    whole = capture(model, ids, tmp_path / "whole.kvtrace")
    less = {"outputs": False, "lse": False, "tokens": False}
    bare = capture(model, ids, tmp_path / "bare.kvtrace", **less)
    assert token_ids(whole) == ids.tolist()
    assert not bare.has("tokens", None)
    assert {kind for _, _, kind in everything(bare)} == {"q", "k", "v"}
    for place, expected in everything(bare).items():
        assert torch.equal(everything(whole)[place], expected)
    for trace, kinds in ((whole, {}), (bare, less)):
        expected = 512 * bytes_per_token(trace.header, **kinds)
        assert expected < trace.num_bytes < expected + 20 * 4096


@pytest.mark.parametrize("make", TESTED)
def test_the_headers_rotation_is_the_keys(make, tmp_path):
    """Keys of layer 0 depend on token and position only, and turn as the header says."""
    model = make()
    trace = capture(model, torch.full((40,), 7), tmp_path / "t.kvtrace")
    rope = trace.header.rope
    assert (rope.kind, rope.interleaved, rope.scaling) == ("default", False, 1.0)
    keys = trace.read("k", 0)
    rotary = Rotary(torch.tensor(rope.inverse_frequencies))
    turned = rotary.shift(keys[:, :1].expand(-1, 40, -1), torch.arange(40))
    torch.testing.assert_close(keys, turned, atol=1e-4, rtol=1e-4)


def test_yarn_scales_rotated_keys(tmp_path):
    """Where RoPE scales cosines and sines, the header says by how much."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    model = random_llama(**SMALL_SHAPE | {"rope_parameters": rope})
    trace = capture(model, torch.full((40,), 7), tmp_path / "t.kvtrace")
    found, keys = trace.header.rope, trace.read("k", 0)
    assert (found.kind, found.scaling) == ("yarn", pytest.approx(0.1 * math.log(4) + 1))
    turned = Rotary(torch.tensor(found.inverse_frequencies)).shift(
        keys[:, :1].expand(-1, 40, -1), torch.arange(40)
    )
    torch.testing.assert_close(keys, turned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", OTHERS)
def test_a_rotation_that_is_not_tested_is_not_claimed(make):
    """Model types outside the tested ones are captured without saying how they rotate."""
    assert plan(make()).rope is None


def test_new_tokens_are_the_greedy_continuation(tmp_path):
    """Continuing records the keys of exactly the tokens that generate would write."""
    model = random_llama(**SMALL_SHAPE)
    ids = prompt(model, 20)
    written = model.generate(ids[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
    expected = capture(model, written, tmp_path / "forced.kvtrace", chunk=20)
    found = capture(model, ids, tmp_path / "free.kvtrace", new_tokens=6)
    assert (found.sequences[0].tokens, found.sequences[0].prompt_len) == (26, 20)
    assert token_ids(found) == written.tolist()
    for place, tensor in everything(expected).items():
        torch.testing.assert_close(everything(found)[place], tensor, atol=1e-4, rtol=1e-3)


def test_sequences_say_where_they_come_from(tmp_path):
    """Prompt lengths, sources and marks are recorded per sequence."""
    model = random_llama(**SMALL_SHAPE)
    trace = capture(
        model,
        [prompt(model, 30), prompt(model, 40)],
        tmp_path / "t.kvtrace",
        prompt_len=[10, 20],
        sources=["a", "b"],
        marks=[[("needle", 3, 8)], []],
    )
    assert [(s.prompt_len, s.source, s.marks) for s in trace.sequences] == [
        (10, "a", (("needle", 3, 8),)),
        (20, "b", ()),
    ]
    again = capture(model, prompt(model, 30), tmp_path / "t.kvtrace", prompt_len=5)
    assert again.sequences[0].prompt_len == 5


def test_the_header_names_the_model_but_no_folder(tmp_path):
    """A saved model has its folder's name and the same fingerprint wherever it lies."""
    model = random_llama(**SMALL_SHAPE)
    headers = []
    for name in ("one", "two"):
        folder = save_model(model, tmp_path / "private" / name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        trace = capture(loaded, prompt(model), tmp_path / "t.kvtrace", tokenizer="ab" * 32)
        headers.append(trace.header)
        assert b"private" not in trace.path.read_bytes()
    assert [header.model for header in headers] == ["one", "two"]
    assert headers[0].fingerprint == headers[1].fingerprint
    assert headers[0].fingerprint != plan(random_llama()).fingerprint
    assert len(headers[0].fingerprint) == 64
    assert (headers[0].policy, headers[0].tokenizer) == ("full", "ab" * 32)
    assert headers[0].producer == f"kvpolicy 0.1.0, transformers {transformers.__version__}"


def test_progress_counts_every_token(tmp_path):
    """`advance` is told chunks as they are done, generated tokens included."""
    model, told = random_llama(**SMALL_SHAPE), []
    ids = torch.stack([prompt(model, 20), prompt(model, 20)])
    capture(model, ids, tmp_path / "t.kvtrace", chunk=8, new_tokens=2, advance=told.append)
    assert told == [8, 8, 4, 1, 1] * 2


# --- the model is left alone ------------------------------------------------------------------


def logits_of(model, ids):
    """Logits of a chunked prefill and a decoded token."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = (ids[:, :20], ids[:, 20:39], ids[:, 39:])
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [*TESTED, *OTHERS])
def test_listening_changes_no_bit_of_the_outputs(make, implementation, tmp_path):
    """Logits before, while and after a model is captured are equal, and so is its config."""
    model = make()
    model.set_attn_implementation(implementation)
    ids = prompt(model, 40)[None]
    config, before = model.config.to_json_string(use_diff=False), logits_of(model, ids)
    with listening(model, lambda _: None):
        during = logits_of(model, ids)
    capture(model, ids, tmp_path / "t.kvtrace")
    assert torch.equal(before, during)
    assert torch.equal(before, logits_of(model, ids))
    assert model.config._attn_implementation == implementation
    assert type(model.config._attn_implementation) is str
    assert model.config.to_json_string(use_diff=False) == config


def test_an_interrupted_capture_is_recoverable_and_leaves_the_model_untouched(tmp_path):
    """What was complete can be repaired, nothing stands under the trace's own name."""
    model = random_llama(**SMALL_SHAPE)
    rows = torch.stack([prompt(model, 600, seed) for seed in range(2)])
    before = logits_of(model, rows[:1, :40])
    told = []

    def interrupt(tokens):
        told.append(tokens)
        if sum(told) > 600:
            raise KeyboardInterrupt

    path = tmp_path / "t.kvtrace"
    with pytest.raises(KeyboardInterrupt):
        capture(model, rows, path, chunk=100, advance=interrupt)
    assert not path.exists()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(before, logits_of(model, rows[:1, :40]))
    repair(tmp_path / "t.kvtrace.part", tmp_path / "saved.kvtrace")
    whole = capture(model, rows[0], path, chunk=100)
    saved = Trace.open(tmp_path / "saved.kvtrace")
    assert saved.sequences[0].tokens == 600
    for place, tensor in everything(saved).items():
        assert torch.equal(tensor, everything(whole)[place])


def test_a_failing_capture_keeps_the_former_trace(tmp_path):
    """A trace is replaced only by a complete one."""
    model = random_llama(**SMALL_SHAPE)
    path = tmp_path / "t.kvtrace"
    capture(model, prompt(model), path)
    before = path.read_bytes()
    with pytest.raises(IndexError):
        capture(model, torch.tensor([1, 2, 10_000]), path)
    assert path.read_bytes() == before
    assert model.config._attn_implementation == "sdpa"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_under_a_policy_is_captured_with_its_full_cache(tmp_path):
    """A PolicyCache made before neither disturbs the capture nor is disturbed by it."""
    model = random_llama(**SMALL_SHAPE)
    ids = prompt(model)
    plain = capture(model, ids, tmp_path / "plain.kvtrace")
    PolicyCache(model, "window:budget=8")
    named = model.config._attn_implementation
    under = capture(model, ids, tmp_path / "under.kvtrace")
    assert model.config._attn_implementation is named
    for place, tensor in everything(plain).items():
        assert torch.equal(everything(under)[place], tensor)
    cache = PolicyCache(model, "window:budget=8")
    with torch.no_grad():
        model(ids[None], past_key_values=cache)
    assert cache.retained_positions(0).tolist() == [list(range(TOKENS - 8, TOKENS))] * 2


def test_a_model_is_captured_once_at_a_time():
    """Listening twice would record one model's calls under another name."""
    model = random_llama(**SMALL_SHAPE)
    with (
        listening(model, lambda _: None),
        pytest.raises(UnsupportedError, match="already"),
        listening(model, lambda _: None),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


# --- what is refused --------------------------------------------------------------------------

SMALL = SMALL_SHAPE | {"pad_token_id": 0}


def mistral_with_window():
    """Its attention forgets by itself."""
    return random_mistral(sliding_window=64)


def qwen2_with_window():
    """Its upper layers slide."""
    config = transformers.Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1)
    return transformers.Qwen2ForCausalLM(config).eval()


def gemma2():
    """Hybrid, with capped logits."""
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)).eval()


def capped_gemma2():
    """Full attention in every layer, with capped logits."""
    config = transformers.Gemma2Config(
        **SMALL, layer_types=["full_attention"] * 2, sliding_window=None
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt_oss():
    """Hybrid, with learned sinks."""
    config = transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config).eval()


def gpt_oss_with_sinks_only():
    """Full attention in every layer, with learned sinks."""
    config = transformers.GptOssConfig(
        **SMALL,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 2,
    )
    return transformers.GptOssForCausalLM(config).eval()


def deepseek():
    """Latent attention."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512, "n_routed_experts": 2}
    config = transformers.DeepseekV3Config(
        **sizes, num_attention_heads=2, num_key_value_heads=2, n_group=1, topk_group=1
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def t5():
    """Encoder and decoder."""
    config = transformers.T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=512)
    return transformers.T5ForConditionalGeneration(config).eval()


def mamba():
    """No attention at all."""
    config = transformers.MambaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=512)
    return transformers.MambaForCausalLM(config).eval()


def bert():
    """Attends to the future."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=512)
    return transformers.BertModel(config).eval()


def bloom():
    """Biases by distance, in code of its own."""
    config = transformers.BloomConfig(n_layer=1, hidden_size=64, n_head=2, vocab_size=512)
    return transformers.BloomForCausalLM(config).eval()


def dynamic_rope():
    """Frequencies move with the length."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return random_llama(**SMALL_SHAPE | {"rope_parameters": rope})


def training():
    """Dropout may be active."""
    return random_llama(**SMALL_SHAPE).train()


def headless():
    """No logits."""
    return random_llama(**SMALL_SHAPE).model


def not_a_model():
    """Something else."""
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mistral_with_window, "sliding_window of 64"),
        (qwen2_with_window, "hybrid"),
        (gemma2, "hybrid"),
        (capped_gemma2, "soft-capping"),
        (gpt_oss, "hybrid"),
        (gpt_oss_with_sinks_only, "s_aux"),
        (deepseek, "MLA"),
        (t5, "encoder-decoder"),
        (mamba, "hybrid"),
        (bert, "language-model head"),
        (bloom, "AttentionInterface"),
        (dynamic_rope, "dynamic"),
        (training, "eval()"),
        (headless, "language-model head"),
        (not_a_model, "Linear"),
    ],
)
def test_other_attention_is_refused_with_the_reason(make, reason, tmp_path):
    """Nothing is written, and the message says what stands in the way."""
    model = make()
    former = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(UnsupportedError) as caught:
        capture(model, torch.arange(1, 9), tmp_path / "t.kvtrace")
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == former


def capped(module, query, key, value, attention_mask, **kwargs):
    """Attention with capped logits that no config mentions."""
    scaling = kwargs["scaling"]
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    logits = 2 * torch.tanh(query @ key.transpose(-1, -2) * scaling / 2)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -math.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


def acausal(module, query, key, value, attention_mask, **kwargs):
    """Attention that sees the future although no mask says so."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = (query @ key.transpose(-1, -2) * kwargs["scaling"]).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def forgetful(module, query, key, value, attention_mask, **kwargs):
    """Attention that forgets what is far away although no mask says so."""
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    seen = (distance >= 0) & (distance < 8)
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    logits = query @ key.transpose(-1, -2) * kwargs["scaling"]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def windowed_mask(**kwargs):
    """A mask that hides distant tokens."""
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return mask & torch.ones_like(mask[0, 0]).triu(-4) if mask is not None else None


def biased_mask(**kwargs):
    """A mask that adds to logits."""
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return torch.where(mask, 0.5, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("attend", "mask", "reason"),
    [
        (capped, sdpa_mask, "differ by"),
        (acausal, lambda **_: None, "differ by"),
        (forgetful, lambda **_: None, "differ by"),
        (sdpa_attention_forward, windowed_mask, "masks more than the future"),
        (sdpa_attention_forward, biased_mask, "masks more than the future"),
    ],
)
def test_attention_that_is_not_what_it_seems_is_found_out(attend, mask, reason, tmp_path):
    """Results are compared with plain attention while capturing, whatever the config says."""
    model = random_llama(**SMALL_SHAPE)
    AttentionInterface.register("odd", attend)
    AttentionMaskInterface.register("odd", mask)
    model.set_attn_implementation("odd")
    with pytest.raises(UnsupportedError, match=reason):
        capture(model, prompt(model), tmp_path / "t.kvtrace")
    assert model.config._attn_implementation == "odd"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"layers": [2]}, "layers must be among 0 to 1"),
        ({"layers": []}, "layers must be among 0 to 1"),
        ({"kv_heads": [-1]}, "kv_heads must be among 0 to 1"),
        ({"query_stride": 0}, "query_stride"),
        ({"chunk": 0}, "chunk"),
        ({"new_tokens": -1}, "new_tokens"),
        ({"sources": ["a", "b"]}, "sources has 2 entries for 1 sequences"),
        ({"marks": [[], []]}, "marks has 2 entries"),
        ({"prompt_len": [1, 2]}, "prompt_len has 2 entries"),
        ({"new_tokens": 40_000}, "trained for 32768 positions"),
        ({"marks": [[("needle", 5, 5)]]}, "mark"),
        ({"prompt_len": -1}, "prompt_len"),
    ],
)
def test_impossible_arguments_are_refused(arguments, reason, tmp_path):
    """Nothing is written for arguments that cannot be right."""
    model = random_llama(**SMALL_SHAPE)
    with pytest.raises((PolicyError, TraceError), match=reason):
        capture(model, prompt(model), tmp_path / "t.kvtrace", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "input_ids",
    [torch.zeros(0), torch.zeros(2, 2, 2), torch.zeros(5), [], [[1, 2]], [torch.ones(())]],
)
def test_input_ids_that_are_none_are_refused(input_ids, tmp_path):
    """Only rows of token ids are sequences."""
    with pytest.raises(PolicyError, match="input_ids"):
        capture(random_llama(**SMALL_SHAPE), input_ids, tmp_path / "t.kvtrace")


def test_the_module_loads_no_transformers():
    """Replaying needs no transformers, so importing the simulator must not load it."""
    import subprocess
    import sys

    script = (
        "import json, sys, kvpolicy_sim.capture, kvpolicy_sim.synth\n"
        "print(json.dumps('transformers' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) is False
