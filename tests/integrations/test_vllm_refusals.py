"""Every feature that the tables call refused stops an engine under a policy, with the remedy."""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import pytest
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType

import kvpolicy
from fixtures.models import random_llama, save_model
from kvpolicy.features import FEATURES, Refused, feature
from kvpolicy_vllm.config import PLAIN_DTYPES, check_engine, features_in_use

pytestmark = pytest.mark.vllm

POLICY = kvpolicy.parse("window:budget=48")

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "speculative decoding": [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    ],
    "KV connectors": [
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        {"kv_offloading_size": 1.0},
    ],
    "KV events": [{"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}],
    "quantised KV caches": [{"kv_cache_dtype": "fp8"}],
    "more ranks than KV heads": [{"tensor_parallel_size": 4}],
    "prompts as embeddings without PolicyWorker": [{"enable_prompt_embeds": True}],
    "LoRA adapters without PolicyWorker": [{"enable_lora": True}],
    "pipeline parallelism without PolicyWorker": [{"pipeline_parallel_size": 2}],
    "pooling models": [{"runner": "pooling"}],
    "sliding windows without the hybrid KV cache manager": [
        {
            "disable_hybrid_kv_cache_manager": True,
            "hf_overrides": {"layer_types": ["full_attention", "sliding_attention"]},
        }
    ],
}
"""Arguments of an engine that use a feature."""

SETTINGS: dict[str, tuple[str, str, Any]] = {
    "fast prefill of layers that share KV caches": (
        "cache_config",
        "kv_sharing_fast_prefill",
        True,
    ),
    "sleep mode": ("model_config", "enable_sleep_mode", True),
    "context parallelism": ("parallel_config", "decode_context_parallel_size", 2),
    "multi-head latent attention": ("model_config", "use_mla", True),
    "encoder-decoder models": ("model_config", "is_encoder_decoder", True),
    "hybrid models": ("model_config", "is_hybrid", True),
    "models without attention": ("model_config", "is_attention_free", True),
    "multimodal models": ("model_config", "is_multimodal_model", True),
    "layers that share KV caches": ("model_config.hf_text_config", "num_kv_shared_layers", 1),
}
"""What a configuration says of a feature that other models, ranks or platforms bring."""

MIXTURE = ("model_config", "is_moe", True)
OURS = {"worker_cls": "kvpolicy_vllm.worker.PolicyWorker"}

CASES = [
    *((name, each, None) for name, rows in ARGUMENTS.items() for each in rows),
    *((name, {}, setting) for name, setting in SETTINGS.items()),
    ("data parallelism of mixtures of experts", {"data_parallel_size": 2}, MIXTURE),
    ("LoRA adapters in mixtures of experts", {"enable_lora": True, **OURS}, MIXTURE),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random Llama on disk."""
    return save_model(random_llama(num_hidden_layers=2), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def config(path) -> VllmConfig:
    """A configuration that uses none of the features."""
    return EngineArgs(model=str(path)).create_engine_config()


def assert_refused(config: VllmConfig, name: str) -> None:
    """The engine does not start, naming feature, reason and remedy as the table has them."""
    answer = feature(name).vllm
    assert isinstance(answer, Refused)
    message = f"{name} ({answer.reason}); {answer.remedy}"
    with pytest.raises(kvpolicy.UnsupportedError, match=re.escape(message)):
        check_engine(config, POLICY)


@pytest.mark.parametrize(("name", "arguments", "setting"), CASES)
def test_refused_features_stop_an_engine(path, name, arguments, setting, monkeypatch):
    """Arguments, models and ranks that would make results silently wrong are refused."""
    config = EngineArgs(model=str(path), **arguments).create_engine_config()
    if setting is not None:
        part, attribute, value = setting
        holder = attrgetter(part)(config)
        # Some are properties, which the class must lose before the object can have a value.
        monkeypatch.setattr(type(holder), attribute, value, raising=False)
        monkeypatch.setitem(vars(holder), attribute, value)
    assert_refused(config, name)


def test_other_platforms_stop_an_engine(config, monkeypatch):
    """On CUDA, as the platform would report it, a policy is refused and never inert."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    assert_refused(config, "platforms other than vLLM's CPU")


@pytest.mark.parametrize("dtype", [d for d in get_args(CacheDType) if d not in PLAIN_DTYPES])
def test_every_quantised_cache_type_is_refused(config, dtype):
    """Whatever vLLM's list holds beside the model's own numbers is refused."""
    config.cache_config.cache_dtype = dtype
    assert_refused(config, "quantised KV caches")


def test_the_table_and_the_engine_refuse_the_same(config):
    """No row is called refused that the engine does not look for, and the reverse."""
    here = Path(__file__).name
    rows = {
        row.name for row in FEATURES if isinstance(row.vllm, Refused) and here in row.vllm.proof
    }
    assert rows == set(features_in_use(config))
    assert rows == {*(name for name, *_ in CASES), "platforms other than vLLM's CPU"}
    assert not any(features_in_use(config).values())
    check_engine(config, POLICY)


def test_vllm_itself_has_no_sleep_mode_on_a_cpu(path):
    """The flag never reaches the plugin, because vLLM refuses it there."""
    with pytest.raises(ValueError, match="Sleep mode is not supported"):
        EngineArgs(model=str(path), enable_sleep_mode=True).create_engine_config()
