"""What cannot be honoured is refused with what, why and what to do, and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
)

from fixtures.caches import small_llama
from fixtures.families import random_gemma3
from fixtures.models import (
    SMALL_SHAPE,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from fixtures.traces import Shape, header_of
from kvpolicy import KVPolicyError, PolicyError, ScorePolicy, UnsupportedError, View
from kvpolicy_hf import PolicyCache
from kvpolicy_hf.checkpoint import load_checkpoint
from kvpolicy_sim.weights import load_weights

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
    "pad_token_id": None,
}


def llava() -> PreTrainedModel:
    """Build a multimodal model."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TINY))
    )


def deepseek() -> PreTrainedModel:
    """Build a model with multi-head latent attention."""
    shape: dict[str, Any] = {
        "head_dim": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
    }
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**TINY | shape))


def flash() -> PreTrainedModel:
    """Build a model that believes it has flash attention."""
    made = random_llama(**TINY)
    made.config._attn_implementation_internal = "flash_attention_2"
    return made


def meta() -> PreTrainedModel:
    """Build a model without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**TINY))


def compiled() -> PreTrainedModel:
    """Build a model that would be compiled at its first forward."""
    made = random_llama(**TINY)
    made.compile(backend="eager")
    return made


def rope(kind: str, **more: Any) -> PreTrainedModel:
    """Build a Llama with scaled RoPE."""
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
    return random_llama(**TINY, rope_parameters=parameters)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: AutoModel.from_config(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "encoder-decoder models keep two caches; use a model of type llama, mistral, qwen3, gemma",
    ),
    "multimodal": (llava, "multimodal models attend in more ways than one"),
    "hybrid": (
        lambda: random_qwen3(**TINY, layer_types=["full_attention", "chunked_attention"]),
        r"layers of types \['chunked_attention'\]",
    ),
    "only sliding layers": (
        lambda: AutoModelForCausalLM.from_config(Gemma3TextConfig(**TINY)),
        "every layer attends to a sliding window",
    ),
    "sliding layers of another type": (
        lambda: AutoModelForCausalLM.from_config(Gemma2Config(**TINY, attn_logit_softcapping=None)),
        "tested in models of type gemma3_text, qwen2, qwen3",
    ),
    "bidirectional": (
        lambda: random_gemma3(use_bidirectional_attention=True),
        "its attention is not causal",
    ),
    "sliding window": (
        lambda: random_mistral(**TINY, sliding_window=4096),
        "a sliding_window of 4096 tokens.*load the model with sliding_window=None",
    ),
    "soft-capping": (
        lambda: AutoModelForCausalLM.from_config(
            Gemma2Config(**TINY, layer_types=["full_attention"] * 2, sliding_window=None)
        ),
        "caps attention logits",
    ),
    "MLA": (deepseek, "multi-head latent attention"),
    "untested": (
        lambda: AutoModelForCausalLM.from_config(
            GPT2Config(
                vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
            )
        ),
        "model type 'gpt2' is not tested; use a model of type llama",
    ),
    "flash": (flash, r"'flash_attention_2' makes no masks.*set_attn_implementation\('sdpa'\)"),
    "on meta": (meta, "on the meta device; load them before"),
    "compiled": (compiled, r"it is compiled.*use it without compile\(\)"),
    "moving RoPE": (lambda: rope("dynamic"), "'dynamic' rotates cached keys by frequencies"),
    "not a model": (
        lambda: torch.nn.Linear(2, 2),
        "needs a transformers PreTrainedModel, got Linear",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_not_known_to_be_right_are_refused(kind: str) -> None:
    """Proves construction names the feature and the way out, and leaves the model alone."""
    make, message = MODELS[kind]
    refused = make()
    config = getattr(refused, "config", None)
    before = getattr(config, "_attn_implementation", None)
    with pytest.raises(UnsupportedError, match=message):
        PolicyCache(refused, "window:budget=8")
    assert getattr(config, "_attn_implementation", None) == before != "kvpolicy"


def test_replaced_attention_is_refused() -> None:
    """Proves the modules are looked at, not only the config's word."""
    changed = random_llama(**TINY)
    changed.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match=r"expected 2 LlamaAttention modules.*found 1"):
        PolicyCache(changed, "full")


SPECS = {
    "window:budget=8,prefill=bulk,protect=prompt": (PolicyError, "drop one of them"),
    "window:budget=0": (PolicyError, "budget and interval must be at least 1"),
    "nothing:budget=8": (PolicyError, "unknown policy 'nothing'; known policies: bswa, centroid"),
}


@pytest.mark.parametrize("spec", SPECS)
def test_policies_that_cannot_be_honoured_are_refused(spec: str) -> None:
    """Proves wrong and unsupported specs fail at construction."""
    error, message = SPECS[spec]
    with pytest.raises(error, match=message):
        PolicyCache(small_llama(), spec)


def test_reindexing_needs_plain_rope() -> None:
    """Proves scaled RoPE works where positions are kept, and is refused where they are ranks."""
    scaled = rope("linear")
    PolicyCache(scaled, "sinks:budget=8")
    with pytest.raises(UnsupportedError, match="rope=reindex needs plain RoPE over whole heads"):
        PolicyCache(scaled, "sinks:budget=8,rope=reindex")


@torch.no_grad()
def fed(spec: Any, num_tokens: int = 20, rows: int = 1, **config: Any) -> tuple[Any, PolicyCache]:
    """Make a model and a cache that has seen some tokens."""
    used: Any = random_llama(**SMALL_SHAPE | config) if config else small_llama()
    past = PolicyCache(used, spec)
    used(torch.tensor([random_prompt(used, num_tokens, 0)] * rows), past_key_values=past)
    return used, past


def state(past: PolicyCache) -> list[Any]:
    """Give everything a row can be asked."""
    layers = range(len(past.layers))
    sets = [past.retained_positions(layer).tolist() for layer in layers]
    ledger = past.ledger().as_dict()
    return [past.get_seq_length(), sets, ledger["bytes_held"], ledger["evicted"]]


def causal(queries: int) -> Tensor:
    """Make a 4D mask that hides one more token than causality and padding do."""
    mask = torch.ones(1, 1, queries, queries, dtype=torch.bool).tril()
    mask[..., 2, 0] = False
    return mask


FORWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "short mask": (
        {"attention_mask": torch.ones(1, 3)},
        "covers 3 columns, but the cache's history and the new tokens are 23",
    ),
    "long mask": ({"attention_mask": torch.ones(1, 24)}, "covers 24 columns"),
    "4D mask": ({"attention_mask": causal(3)}, "not causal attention with padding"),
    "wide 4D mask": ({"attention_mask": causal(23)}, "not causal attention with padding"),
    "unknown effect": ({"softcap": 30.0}, r"asks for \['softcap'\]"),
    "attention sinks": ({"s_aux": torch.zeros(4)}, r"asks for \['s_aux'\]"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
    "other rows": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64)},
        "holds 1 rows but the forward has 2",
    ),
}


@pytest.mark.parametrize("kind", FORWARDS)
@torch.no_grad()
def test_forwards_that_cannot_be_honoured_change_nothing(kind: str) -> None:
    """Proves a refused forward leaves every layer as it was, and the next one works."""
    used, past = fed("h2o:budget=16")
    arguments, message = FORWARDS[kind]
    before = state(past)
    with pytest.raises(UnsupportedError, match=message):
        used(**{"input_ids": torch.tensor([[1, 2, 3]])} | arguments, past_key_values=past)
    assert state(past) == before
    used(torch.tensor([[1, 2, 3]]), past_key_values=past)
    assert past.ledger().logical_tokens == 23


@torch.no_grad()
def test_positions_past_the_models_length_are_refused_before_anything_changes() -> None:
    """Proves rope_beyond=refuse, its way out, and that cache ranks need none."""
    used, past = fed("h2o:budget=16", 30, max_position_embeddings=32)
    before = state(past)
    message = "would reach 33 tokens, past the model's max_position_embeddings=32; add rope_beyond"
    with pytest.raises(UnsupportedError, match=message):
        used(torch.tensor([[1, 2, 3]]), past_key_values=past)
    assert state(past) == before
    for spec in ("h2o:budget=16,rope_beyond=allow", "sinks:budget=16,rope=reindex"):
        _, past = fed(spec, 40, max_position_embeddings=32)
        assert past.ledger().logical_tokens == 40


def test_padding_does_not_count_towards_the_models_length() -> None:
    """Proves the limit is on real tokens."""
    short: Any = random_llama(**SMALL_SHAPE | {"max_position_embeddings": 32})
    past = PolicyCache(short, "window:budget=16")
    mask = torch.tensor([[0] * 20 + [1] * 30])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.ones(1, 50, dtype=torch.int64)
    with torch.no_grad():
        short(ids, attention_mask=mask, position_ids=positions, past_key_values=past)
    assert past.ledger().logical_tokens == 30


OPERATIONS: dict[str, tuple[Callable[[PolicyCache], Any], str]] = {
    "crop": (lambda past: past.crop(-1), "crop.*copy.deepcopy"),
    "beams": (lambda past: past.reorder_cache(torch.LongTensor([0])), "beam search.*num_beams=1"),
    "repeat": (lambda past: past.batch_repeat_interleave(2), "repeat the prompts before"),
    "select": (
        lambda past: past.batch_select_indices(torch.tensor([0])),
        "one PolicyCache per batch",
    ),
    "rollback": (lambda past: past.activate_past_recording(), "without an assistant"),
    "static": (
        lambda past: past.early_initialization(1, 2, 32, torch.float32, torch.device("cpu")),
        "static shapes",
    ),
    "offload": (lambda past: past.offload(0), "offloading"),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_cache_operations_that_need_evicted_tokens_are_refused(kind: str) -> None:
    """Proves each names itself and what to do instead, and changes nothing."""
    _, past = fed("h2o:budget=16")
    operate, message = OPERATIONS[kind]
    before = state(past)
    with pytest.raises(UnsupportedError, match=message):
        operate(past)
    assert state(past) == before
    assert not past.is_compileable
    assert not past.is_croppable


GENERATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
}


@pytest.mark.parametrize("kind", GENERATIONS)
def test_ways_to_generate_that_roll_back_are_refused(kind: str) -> None:
    """Proves `generate` itself meets the refusals."""
    arguments, message = GENERATIONS[kind]
    ids = torch.tensor([random_prompt(small_llama(), 20, 0)])
    with pytest.raises(UnsupportedError, match=message):
        small_llama().generate(
            ids,
            past_key_values=PolicyCache(small_llama(), "full"),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )


@torch.no_grad()
def test_a_policy_that_would_not_run_is_an_error() -> None:
    """Proves a cache is never silently inert: neither on another model nor after a change."""
    used, past = fed("h2o:budget=16", rope_theta=1e4)
    used.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="is 'sdpa', so its policy would not run"):
        used(torch.tensor([[1]]), past_key_values=past)
    other: Any = random_llama(1, **SMALL_SHAPE)
    _, past = fed("h2o:budget=16")
    with pytest.raises(KVPolicyError, match="use the cache with the model it was made for"):
        other(torch.tensor([[1]]), past_key_values=past)


class Fragile(ScorePolicy):
    """A policy that fails in one layer."""

    name = "fragile"
    layer: int = 0

    def score(self, view: View) -> Tensor:
        """Fail after 20 tokens."""
        if int(view.n.max()) > 20 and view.layer == self.layer:
            raise ZeroDivisionError
        return view.positions


@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 24, [1] * 22 + [0, 1]])])
@torch.no_grad()
def test_a_policy_failing_in_the_first_layer_changes_nothing(mask: Tensor | None) -> None:
    """Proves the first layer decides everything before it stores anything."""
    used, past = fed(Fragile(budget=16), 20, rows=2)
    before = state(past)
    with pytest.raises(ZeroDivisionError):
        used(torch.ones(2, 4, dtype=torch.int64), attention_mask=mask, past_key_values=past)
    assert state(past) == before


@torch.no_grad()
def test_a_forward_failing_midway_makes_the_cache_say_so() -> None:
    """Proves layers of unequal lengths are never used or reported, until reset."""
    used, past = fed(Fragile(budget=16, layer=1))
    with pytest.raises(ZeroDivisionError):
        used(torch.tensor([[1, 2]]), past_key_values=past)
    for use in (
        lambda: used(torch.tensor([[1, 2]]), past_key_values=past),
        past.ledger,
        lambda: past.retained_positions(0),
    ):
        with pytest.raises(KVPolicyError, match=r"failed midway.*call reset\(\)"):
            use()
    past.reset()
    used(torch.tensor([[1, 2]]), past_key_values=past)
    assert past.ledger().logical_tokens == 2


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    """Proves a forward outside no_grad works, and backward does not return wrong gradients."""
    used: Any = random_llama(**SMALL_SHAPE)
    past = PolicyCache(used, "h2o:budget=16")
    logits = used(torch.tensor([[1, 2, 3]]), past_key_values=past).logits
    with pytest.raises(UnsupportedError, match="no gradients"):
        logits.sum().backward()


def test_active_dropout_is_refused() -> None:
    """Proves training mode with attention dropout does not pass unnoticed."""
    config: dict[str, Any] = SMALL_SHAPE | {"attention_dropout": 0.5}
    used: Any = random_llama(**config).train()
    with pytest.raises(UnsupportedError, match=r"dropout 0.5 is active; call model.eval\(\)"):
        used(torch.tensor([[1, 2, 3]]), past_key_values=PolicyCache(used, "full"))


def test_a_row_that_does_not_exist_is_an_error() -> None:
    """Proves rows are counted from zero and checked."""
    _, past = fed("h2o:budget=16")
    for ask in (lambda: past.ledger(1), lambda: past.retained_positions(0, 1)):
        with pytest.raises(IndexError, match="row 1 of a cache with 1 rows"):
            ask()


def test_other_caches_are_untouched_by_refusals() -> None:
    """Proves the strict checks are for policies only: softcap-free sdpa still gets its kwargs."""
    PolicyCache(small_llama(), "full")
    with torch.no_grad():
        small_llama()(torch.tensor([[1, 2]]), past_key_values=DynamicCache(), softcap=None)


def test_weights_in_a_pickle_are_refused(tmp_path):
    """A folder whose weights would have to be unpickled is no model, for evaluation and replay."""
    model = random_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="cannot load a model"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(UnsupportedError, match="cannot load a model"):
        load_weights(str(tmp_path), header_of(Shape()))
