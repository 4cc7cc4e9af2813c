"""Draws the pictures of docs/explanation: what one head of the bundled model sees under a policy.

    .venv/bin/python docs/figures/draw.py

A passage of the bundled held-out text goes through the model once; then one KV head attends again
under each policy, token by token, with the unit vectors as values. So its outputs are its
attention weights on positions, through memories too, whatever they blend.

The first PROMPT tokens are the prompt of policies that set prompts apart.

A mix has another policy in other layers: its picture has the same head of two of them.

Rows are tokens in the order of reading, columns the positions they look at. Blue is attention on
tokens that are held as they are, orange on what a memory has made of tokens; the darker, the more
(logarithmic). Pale blue: held, hardly attended. White: gone.
"""

import struct
import zlib
from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from kvpolicy import bundled_model, parse
from kvpolicy.attention import AttentionLayer
from kvpolicy.bundled import heldout_text
from kvpolicy.engine import step
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Trace
from kvpolicy_hf.checkpoint import load_checkpoint
from kvpolicy_sim import capture

TOKENS, LAYER, KV_HEAD = 320, 5, 1
PROMPT = 224
FIRST = 200
"""Where in the held-out text the passage begins, in tokens."""

POLICIES = {
    "full": "full",
    "window": "window:budget=64",
    "sinks": "sinks:budget=64",
    "h2o": "h2o:budget=64",
    "tova": "tova:budget=64",
    "random": "random:budget=64",
    "snapkv": "snapkv:budget=64,window=16",
    "knorm": "knorm:budget=64,prefill=bulk",
    "keydiff": "keydiff:budget=64,prefill=bulk",
    "bswa": "bswa:block=16,segments=3",
    "bswa-sinks": "bswa:block=16,segments=3,sinks=4",
    "compressive-mean": "compressive:budget=64,sinks=4",
    "compressive-most-used": "compressive:budget=64,sinks=4,fn=most-used",
    "compressive-attention": "compressive:budget=64,sinks=4,fn=attention",
    "centroid": "centroid:budget=64,sinks=4",
    "centroid-half": "centroid:budget=64,sinks=4,slots=0.5",
    "fam": "fam:block=16,segments=2,slots=16,sinks=4",
    "infini-closed": "infini:segment=64",
    "infini-open": "infini:segment=64,gate=0.2",
    "infini-delta": "infini:segment=64,gate=0.2,update=delta",
    "mix": "mix:layers=(0-3:window;4-:h2o),budget=64",
}
"""Policies by the names of their pictures."""

LAYERS = {"mix": (3, LAYER)}
"""Layers that are drawn side by side, where it is not `LAYER` alone."""

GAP = 20
"""Pixels between them."""

LEVELS = 64
"""Shades of each colour."""

RAMPS = (((255, 255, 255), (166, 54, 3)), ((222, 235, 250), (8, 48, 107)))
"""From no attention to all of it: on what is gone or in a memory, and on what is held."""

FAINTEST = 1e-4
"""Weight that is as good as none."""


def main() -> None:
    """Draw them all."""
    folder = Path(__file__).parent
    with TemporaryDirectory() as scratch:
        trace = record(Path(scratch) / "passage.kvtrace")
        for name, spec in POLICIES.items():
            parts = [shades(*look(trace, spec, layer)) for layer in LAYERS.get(name, (LAYER,))]
            gaps = [np.zeros((TOKENS, GAP), int)] * (len(parts) - 1)
            rows = [x for pair in zip_longest(parts, gaps) for x in pair if x is not None]
            (folder / f"{name}.png").write_bytes(png(np.concatenate(rows, axis=1)))
            print(f"{name}.png  {spec}")


def record(path: Path, first: int = FIRST) -> Trace:
    """Queries, keys and values of the passage that begins with the token `first`."""
    checkpoint = load_checkpoint(bundled_model())
    tokens = checkpoint.encode(heldout_text())[first : first + TOKENS - 1]
    ids = torch.tensor([[*checkpoint.start, *tokens]])
    return capture(checkpoint.model, ids, path, layers=sorted({LAYER, *chain(*LAYERS.values())}))


def look(trace: Trace, spec: str, layer_index: int = LAYER) -> tuple[np.ndarray, np.ndarray]:
    """Weights of each token on each position, and which of them were held; both [T, T]."""
    header = trace.header
    q, k = (trace.read(kind, layer_index, dtype=torch.float32) for kind in ("q", "k"))
    group = q.shape[0] // k.shape[0]
    q, k = q[None, KV_HEAD * group : (KV_HEAD + 1) * group], k[None, KV_HEAD : KV_HEAD + 1]
    units = torch.eye(TOKENS)[None, None]
    rotary = Rotary(torch.tensor(header.rope.inverse_frequencies))
    policy = parse(spec).of_layer(layer_index)
    layer = AttentionLayer(policy, layer_index, header.scale, rotary)
    slots = layer.new_slots(q, k, units, prompts=[PROMPT])
    [law] = slots.laws(layer.occupancy)
    weights, held = np.zeros((TOKENS, TOKENS)), np.zeros((TOKENS, TOKENS), bool)
    for t in range(TOKENS):
        before = law.held(t)
        held[t, slots.positions[0, 0, :before].numpy()] = held[t, t] = True
        output = step(layer, slots, q[:, :, t], k[:, :, t], units[:, :, t])
        weights[t] = output[0].mean(dim=0)
    return weights, held


def shades(weights: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Palette index of each pixel, weights on a logarithmic scale from `FAINTEST` to 1."""
    strength = 1 - np.log(np.clip(weights, FAINTEST, 1)) / np.log(FAINTEST)
    return held * LEVELS + np.round(strength * (LEVELS - 1)).astype(int)


def png(pixels: np.ndarray) -> bytes:
    """A picture from palette indices [height, width]."""
    height, width = pixels.shape
    steps = np.linspace(0, 1, LEVELS)[:, None]
    ramps = [np.array(pale) * (1 - steps) + np.array(dark) * steps for pale, dark in RAMPS]
    rows = np.pad(pixels.astype(np.uint8), ((0, 0), (1, 0)))  # each begins with its filter: none
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", np.round(np.concatenate(ramps)).astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


if __name__ == "__main__":
    main()
