"""Writing the model as a folder that transformers and vLLM load, and reading it back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from kvpolicy.bundled.training.model import Architecture, Llama
from kvpolicy.bundled.training.tokenizer import BOS, BOS_ID, EOS, EOS_ID, PAD, PAD_ID

MAX_POSITIONS = 131_072


def model_config(sizes: Architecture) -> dict[str, object]:
    """Return the contents of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_query_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": MAX_POSITIONS,
}

GENERATION_CONFIG = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "do_sample": False,
}


def export(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights in bfloat16, tokenizer and configurations into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = out / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    # safetensors leaves its files readable by their owner alone.
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    for name, contents in (
        ("config.json", model_config(model.sizes)),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (out / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """Load an exported model, its bfloat16 weights widened to float32, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(
        Architecture(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_query_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            intermediate=config["intermediate_size"],
            rope_theta=config["rope_theta"],
            norm_epsilon=config["rms_norm_eps"],
        )
    )
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
    )
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))
