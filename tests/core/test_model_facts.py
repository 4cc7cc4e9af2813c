"""config.json files: what is read, what is assumed, and what is refused with which reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy.model_facts import MAX_CONFIG_BYTES, model_facts, read_model_facts

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def llama(**changes: Any) -> dict[str, Any]:
    """Llama-3-8B's config with changes; None takes a field away."""
    return {key: value for key, value in (LLAMA | changes).items() if value is not None}


def without(*keys: str) -> dict[str, Any]:
    """The same without some fields."""
    return llama(**dict.fromkeys(keys))


def sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads, head_dim."""
    facts = model_facts(config)
    return facts.num_layers, facts.num_query_heads, facts.num_kv_heads, facts.head_dim


def test_bundled_model_is_read() -> None:
    """Proves the reader on the file that transformers wrote for the bundled model."""
    facts = read_model_facts(kvpolicy.bundled_model())
    assert (facts.num_layers, facts.num_query_heads, facts.num_kv_heads) == (6, 4, 2)
    assert (facts.head_dim, facts.positions, facts.dtype) == (64, 131072, "bfloat16")
    assert facts.model_type == "llama"
    assert facts.notes == ()


def test_head_dim_defaults_to_the_hidden_size_split_among_the_heads() -> None:
    """Proves hidden_size / num_attention_heads, and that a stated head_dim wins."""
    assert sizes(llama()) == (32, 32, 8, 128)
    assert sizes(llama(head_dim=256)) == (32, 32, 8, 256)
    assert sizes(llama() | {"head_dim": None}) == (32, 32, 8, 128)


def test_kv_heads_default_to_the_query_heads() -> None:
    """Proves plain multi-head attention for configs older than grouped queries."""
    assert sizes(without("num_key_value_heads")) == (32, 32, 32, 128)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": None, "torch_dtype": None}, None),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_dtype_has_a_new_and_an_old_key(fields: dict[str, Any], dtype: str | None) -> None:
    """Proves that `dtype` goes before `torch_dtype`."""
    assert model_facts(without("torch_dtype") | fields).dtype == dtype


def test_text_config_of_a_multimodal_model_is_read() -> None:
    """Proves that the decoder's sizes are nested ones, and that the hosts' refusal is noted."""
    text = llama(num_hidden_layers=7, head_dim=64) | {"torch_dtype": None}
    config = {"model_type": "llava", "num_hidden_layers": 99, "dtype": "float16"}
    facts = model_facts(config | {"text_config": text, "vision_config": {"hidden_size": 8}})
    assert (facts.num_layers, facts.head_dim, facts.dtype) == (7, 64, "float16")
    (note,) = facts.notes
    assert "multimodal" in note


@pytest.mark.parametrize(
    ("model_type", "missing", "is_known"),
    [
        ("llama", "num_key_value_heads", True),
        ("llama", "head_dim", True),
        ("qwen2", "head_dim", True),
        ("mistral", "head_dim", True),
        ("mistral", "num_key_value_heads", False),
        ("gemma3_text", "num_key_value_heads", False),
        ("gemma3_text", "head_dim", False),
        ("llama", "num_hidden_layers", False),
    ],
)
def test_nested_config_is_not_completed_by_guessing(
    model_type: str, missing: str, is_known: bool
) -> None:
    """Proves that a nested field equal to its model type's default is refused unless known."""
    text = llama(head_dim=128, model_type=model_type) | {missing: None}
    if is_known:
        assert model_facts({"text_config": text}).num_layers == 32
        return
    with pytest.raises(PolicyError, match=rf"text_config has no {missing}: .* write it into"):
        model_facts({"text_config": text})


def test_outer_config_of_a_nested_one_is_judged_too() -> None:
    """Proves that what rules a model out counts wherever it is written."""
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        model_facts({"is_encoder_decoder": True, "text_config": llama(head_dim=128)})


def test_absent_positions_are_noted() -> None:
    """Proves that a model without stated positions says that nothing limits its contexts."""
    facts = model_facts(without("max_position_embeddings"))
    assert facts.positions is None
    assert "max_position_embeddings" in facts.notes[0]


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_missing_field_is_named(key: str) -> None:
    """Proves that what cannot be defaulted is asked for by name."""
    with pytest.raises(PolicyError, match=f"config.json has no {key}"):
        model_facts(without(key))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, None) for name in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral", "Gemma")),
        *((name, None) for name in ("Gemma3", "Gemma3Text")),
        *((name, None) for name in ("GPTNeoX", "Phi3", "Starcoder2", "OPT", "Llava", "PaliGemma")),
        ("Mistral", "sliding_window of 4096 tokens"),
        *((name, "hybrid") for name in ("Gemma2", "GptOss", "Qwen3Next", "Llama4")),
        *((name, "hybrid") for name in ("Mamba", "Jamba", "Bamba", "RecurrentGemma", "Mllama")),
        *((name, "MLA") for name in ("DeepseekV2", "DeepseekV3")),
        *((name, "encoder-decoder") for name in ("T5", "Whisper")),
        *((name, "an encoder") for name in ("Bert", "ModernBert")),
        ("Gemma3n", "share KV caches"),
        ("Falcon", "names its KV heads by num_kv_heads"),
        ("GPT2", "has no num_hidden_layers"),
    ],
)
def test_configs_of_transformers_are_read_or_refused(
    tmp_path: Path, name: str, reason: str | None
) -> None:
    """Proves the reader on what transformers itself writes, against what transformers knows."""
    import transformers

    config = getattr(transformers, f"{name}Config")()
    config.save_pretrained(tmp_path)
    if reason is not None:
        with pytest.raises(PolicyError, match=reason):
            read_model_facts(str(tmp_path))
        return
    facts, text = read_model_facts(str(tmp_path)), config.get_text_config()
    assert facts.num_layers == text.num_hidden_layers
    assert facts.num_query_heads == text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None)
    assert facts.num_kv_heads == (kv_heads or text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None)
    assert facts.head_dim == (head_dim or text.hidden_size // text.num_attention_heads)
    assert facts.positions == text.max_position_embeddings


NONSENSE = [0, -1, 1.5, 32.0, "32", True, [32], {}, 1 << 31, 10**400]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda x: type(x).__name__ + str(x)[:5])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
def test_nonsense_is_refused_by_name(key: str, value: Any) -> None:
    """Proves that sizes are positive integers of a sensible size, in every field."""
    config = llama(head_dim=None if key == "hidden_size" else 128) | {key: value}
    with pytest.raises(PolicyError, match=f"{key} must be a positive integer"):
        model_facts(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads=32 is no multiple of num_key_value_head"),
        ({"num_key_value_heads": 64}, "no multiple"),
        ({"hidden_size": 4097}, "hidden_size=4097 is no multiple of num_attention_heads=32"),
        ({"layer_types": ["full_attention"] * 3}, "3 layer_types for num_hidden_layers=32"),
        ({"layer_types": []}, "0 layer_types for num_hidden_layers=32"),
        ({"model_type": 3}, "model_type must be a name"),
        ({"model_type": "\x1b[31m"}, "model_type must be a name"),
        ({"dtype": ["bfloat16"]}, "dtype must be a name"),
        ({"text_config": "text"}, "text_config: got 'text', expected an object"),
    ],
)
def test_contradiction_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Proves that fields must agree with each other."""
    with pytest.raises(PolicyError, match=reason):
        model_facts(llama(**changes))


GEMMA3 = LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 26,
    "head_dim": 256,
    "sliding_window": 512,
}


@pytest.mark.parametrize(
    ("config", "num_sliding"),
    [
        (GEMMA3 | {"sliding_window_pattern": 6}, 22),
        (
            GEMMA3
            | {
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4
                + ["sliding_attention"] * 2
            },
            22,
        ),
        (GEMMA3 | {"layer_types": ["full_attention"] * 26}, 0),
        (
            llama(
                model_type="qwen3",
                use_sliding_window=True,
                sliding_window=512,
                layer_types=["full_attention"] * 28 + ["sliding_attention"] * 4,
            ),
            4,
        ),
    ],
)
def test_sliding_layers_are_counted(config: dict[str, Any], num_sliding: int) -> None:
    """Proves both ways to say which layers slide, and that plans say what it means for them."""
    facts = model_facts(config)
    assert facts.num_sliding == num_sliding
    assert facts.window == (512 if num_sliding else 1)
    assert any("counted as their window decodes" in note for note in facts.notes) == (
        num_sliding > 0
    )


def test_layers_that_all_slide_are_refused() -> None:
    """Proves that a policy needs a layer to rule."""
    with pytest.raises(UnsupportedError, match="every layer attends to a sliding window"):
        model_facts(GEMMA3 | {"layer_types": ["sliding_attention"] * 26})


def test_a_window_without_a_size_is_refused() -> None:
    """Proves that nothing is guessed about how long it is."""
    config = GEMMA3 | {"sliding_window_pattern": 6, "sliding_window": None}
    with pytest.raises(PolicyError, match="has no sliding_window"):
        model_facts(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"model_type": "bert"}, "encoder"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "hybrid, layer_types"),
        ({"layer_types": "full_attention"}, "hybrid, layer_types"),
        ({"sliding_window": 4096}, "sliding_window of 4096 tokens"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
        ({"sliding_window_pattern": 6}, "hybrid, sliding_window_pattern"),
        ({"attn_layer_period": 8}, "hybrid"),
        ({"layers_block_type": ["mamba"]}, "hybrid"),
        ({"full_attention_interval": 4}, "hybrid"),
        ({"state_size": 16}, "hybrid"),
        ({"attention_chunk_size": 8192}, "hybrid"),
        ({"cross_attention_layers": [3]}, "hybrid"),
        ({"num_kv_shared_layers": 2}, "share KV caches"),
        ({"v_head_dim": 64}, "one size"),
        ({"num_key_value_heads": None, "multi_query": True}, "names its KV heads by multi_query"),
        ({"num_key_value_heads": None, "num_kv_heads": 8}, "num_kv_heads"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_model_without_a_plain_cache_is_refused(
    changes: dict[str, Any], reason: str, nested: bool
) -> None:
    """Proves that each kind of model that no policy runs on is refused with its reason."""
    config = llama(**changes)
    with pytest.raises(UnsupportedError, match=reason):
        model_facts({"text_config": config} if nested else config)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 131072, "use_sliding_window": False},
        {"sliding_window": 0},
        {"layer_types": ["full_attention"] * 32},
        {"is_encoder_decoder": False},
        {"v_head_dim": 128},
    ],
)
def test_disabled_feature_is_no_obstacle(changes: dict[str, Any]) -> None:
    """Proves that a feature that is named but off does not refuse a model."""
    assert sizes(llama(**changes)) == (32, 32, 8, 128)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attn_logit_softcapping": 50.0}, "cap attention logits"),
        ({"alibi": True}, "ALiBi"),
        ({"vision_config": {"depth": 2}}, "multimodal"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "quantised KV cache"),
    ],
)
def test_what_hosts_refuse_is_noted(changes: dict[str, Any], word: str) -> None:
    """Proves that a model whose arithmetic holds is planned for, with the hosts' refusal."""
    (note,) = model_facts(llama(**changes)).notes
    assert word in note


def test_weights_quantisation_is_no_note() -> None:
    """Proves that quantised weights leave keys and values alone."""
    assert model_facts(llama(quantization_config={"quant_method": "awq"})).notes == ()


@pytest.mark.parametrize(
    ("ranks", "heads"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1), (32, 1), (3, None), (64, None)]
)
def test_kv_heads_are_split_as_vllm_does(ranks: int, heads: int | None) -> None:
    """Proves division, replication where there are more ranks than KV heads, and refusal."""
    facts = model_facts(llama())
    if heads is None:
        with pytest.raises(PolicyError, match=f"over {ranks} tensor-parallel ranks"):
            facts.kv_heads_per_rank(ranks)
    else:
        assert facts.kv_heads_per_rank(ranks) == heads


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"\x80\x04K\x01.", "is not JSON"),
        (b"[1, 2]", "expected an object"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
    ids=["empty", "pickle", "list", "deep", "digits", "large"],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """Proves that damaged, hostile and huge files give an error of ours, quickly."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PolicyError, match=reason):
        read_model_facts(str(tmp_path))


@pytest.mark.parametrize("name", ["", "nothing", "meta-llama/Meta-Llama-3-8B", "a\0b"])
def test_folder_without_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Proves that a wrong path, or the name of a model on a hub, is answered with what to give."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PolicyError, match="nothing is downloaded"):
        read_model_facts(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(st.sampled_from([*LLAMA, "text_config", "dtype", "layer_types"]), JSON)
)
def test_any_content_is_read_or_refused(changes: dict[str, Any]) -> None:
    """Proves that no content raises anything but our error."""
    try:
        facts = model_facts(json.loads(json.dumps(LLAMA | changes)))
    except PolicyError:
        return
    assert facts.num_query_heads % facts.num_kv_heads == 0
