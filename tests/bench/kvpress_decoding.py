"""Decoding with kvpress: a program of the environment that `make bench-env` builds.

It says "ready" when every press has a full cache, then answers a line "PRESS STEPS" with the
CPU and wall time of as many decoding steps as JSON, until its input ends. Being told when to
run, it can take turns with what it is compared to.

The model is a random Llama of hidden size 256, so that nearly all of its time is attention over
the cache, which has the size that is asked for.
"""

import argparse
import contextlib
import json
import sys
import time

import kvpress
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {
    # Observed attention needs the weights, which only eager attention returns. TOVA computes its
    # row itself under sdpa, which is faster.
    "observed": (kvpress.ObservedAttentionPress, "eager"),
    "tova": (kvpress.TOVAPress, "sdpa"),
    "streaming": (kvpress.StreamingLLMPress, "sdpa"),
}
HIDDEN, VOCABULARY = 256, 64


class Decoder:
    """One press in steady state: a full cache, compressed after every token."""

    def __init__(self, press: str, options: argparse.Namespace, stack: contextlib.ExitStack):
        scorer, attention = PRESSES[press]
        config = LlamaConfig(
            num_hidden_layers=options.layers,
            num_key_value_heads=options.kv_heads,
            num_attention_heads=options.kv_heads * options.group,
            head_dim=options.head_dim,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            vocab_size=VOCABULARY,
            max_position_embeddings=2 * options.budget,
            attn_implementation=attention,
        )
        torch.manual_seed(0)
        self._model = LlamaForCausalLM(config).eval()
        self._cache = DynamicCache(config=config)
        decoding = kvpress.DecodingPress(
            base_press=scorer(), compression_interval=1, target_size=options.budget
        )
        stack.enter_context(decoding(self._model))
        self._forward(options.budget)
        self.decode(2)
        held = {layer.keys.shape[2] for layer in self._cache.layers}
        assert held == {options.budget}, f"{press} holds {held} tokens"

    def decode(self, steps: int) -> dict[str, float]:
        """Take some tokens; return the seconds that they took."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._forward(1)
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}

    def _forward(self, tokens: int) -> None:
        ids = torch.randint(VOCABULARY, (1, tokens))
        self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


def main() -> None:
    """Serve measurements on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("layers", "kv-heads", "group", "head-dim", "budget"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        decoders = {press: Decoder(press, options, stack) for press in PRESSES}
        print("ready", flush=True)
        for line in sys.stdin:
            press, steps = line.split()
            print(json.dumps(decoders[press].decode(int(steps))), flush=True)


if __name__ == "__main__":
    main()
