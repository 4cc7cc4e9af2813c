"""What the model can do: bits per byte on held-out books, and finding what was stated earlier.

Answers are scored with the right answer as input: all its tokens are the likeliest ones exactly
when greedy decoding writes it. `python -m kvpolicy.bundled.training.evaluate --help` measures an
exported model.
"""

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kvpolicy.bundled.passkey import REPEATED_FILLER, make_passkey
from kvpolicy.bundled.training.corpus import Corpus, load_corpus
from kvpolicy.bundled.training.model import Architecture, Llama, rotary_tables
from kvpolicy.bundled.training.tasks import ANSWERED, Mix, Tasks
from kvpolicy.bundled.training.tokenizer import BOS_ID, NUM_SPECIAL, PAD_ID, encode

BATCH_TOKENS = 8192
FILLER_TOKENS = 60_000


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of an evaluation that one process does: every `world`-th sample from `rank`."""

    rank: int = 0
    world: int = 1


@dataclass
class Tally:
    """A sum and what to divide it by; tallies of several processes add up."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float) -> None:
        self.total += total
        self.count += count

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many UTF-8 bytes each token stands for."""
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    # Byte-level BPE writes every byte as one character.
    for text, token in tokenizer.get_vocab().items():
        sizes[token] = len(text) if token >= NUM_SPECIAL else 0
    return sizes


@torch.no_grad()
def heldout_bits(
    model: Llama,
    corpus: Corpus,
    tokenizer: Tokenizer,
    length: int,
    *,
    num_windows: int | None = None,
    share: Share = Share(),
) -> Tally:
    """Tally bits and bytes over windows of `length` tokens, each behind its own BOS.

    Args:
        num_windows: How many windows, spread evenly over the books; all of them when None.
    """
    body = length - 1
    starts = np.concatenate(
        [
            np.arange(corpus.starts[book], corpus.starts[book + 1] - body + 1, body)
            for book in range(corpus.num_books)
        ]
    )
    if num_windows is not None:
        starts = starts[np.linspace(0, len(starts) - 1, num_windows).astype(int)]
    starts = starts[share.rank :: share.world]
    cosine, sine = rotary_tables(length, model.sizes.head_dim, model.sizes.rope_theta)
    bytes_of, tally = token_bytes(tokenizer), Tally()
    rows = max(1, BATCH_TOKENS // length)
    for first in range(0, len(starts), rows):
        windows = [corpus.tokens[start : start + body] for start in starts[first : first + rows]]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=BOS_ID)  # [B, T]
        losses = model.token_losses(tokens, cosine[:body], sine[:body])
        tally.add(losses.sum().item() / math.log(2), float(bytes_of[tokens[:, 1:].numpy()].sum()))
    return tally


@torch.no_grad()
def predicted(model: Llama, tokens: Tensor) -> Tensor:
    """Return the likeliest next token at every position but the last, [B, T - 1]."""
    length = tokens.shape[1] - 1
    cosine, sine = rotary_tables(length, model.sizes.head_dim, model.sizes.rope_theta)
    hidden = model(tokens[:, :-1], cosine, sine)
    return (hidden @ model.embed_tokens.weight.mT).argmax(-1)


def passkey_accuracy(
    model: Llama,
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    num_samples: int,
    *,
    seed: int = 1,
    share: Share = Share(),
) -> Tally:
    """Tally pass keys found; every fourth prompt is padded with repeated sentences."""
    tally = Tally()
    for sample in range(share.rank, num_samples, share.world):
        rng = Random(seed * 1_000_003 + sample)
        book = corpus.book(sample % corpus.num_books)
        start = rng.randrange(max(1, len(book) - FILLER_TOKENS))
        text = tokenizer.decode(book[start : start + FILLER_TOKENS].tolist())
        filler = REPEATED_FILLER * 8 if sample % 4 == 3 else text
        asked = make_passkey(rng, filler, lambda text: encode(tokenizer, text), context)
        prompt, answer = encode(tokenizer, asked.prompt), encode(tokenizer, asked.answer)
        tokens = torch.tensor([[BOS_ID, *prompt, *answer]])
        right = predicted(model, tokens)[0, -len(answer) :] == torch.tensor(answer)
        tally.add(float(right.all()), 1)
    return tally


def answer_accuracy(
    model: Llama, tasks: Tasks, mix: Mix, length: int, num_samples: int, *, share: Share = Share()
) -> Tally:
    """Tally answer tokens predicted in training sequences of one kind."""
    tally = Tally()
    for sample in range(share.rank, num_samples, share.world):
        drawn = tasks.batch(mix, length, 1, [2, sample])
        right = predicted(model, torch.from_numpy(drawn.tokens)).numpy() == drawn.tokens[:, 1:]
        answers = drawn.weights[:, 1:] == ANSWERED
        tally.add(float(right[answers].sum()), float(answers.sum()))
    return tally


def induction_accuracy(
    model: Llama, length: int, num_samples: int, *, share: Share = Share()
) -> Tally:
    """Tally tokens predicted in the second half of a random sequence said twice."""
    half = (length - 1) // 2
    tally = Tally()
    for sample in range(share.rank, num_samples, share.world):
        generator = torch.Generator().manual_seed(sample)
        vocabulary = model.sizes.vocabulary
        said = torch.randint(PAD_ID + 1, vocabulary, (1, half), generator=generator)
        tokens = torch.cat((torch.tensor([[BOS_ID]]), said, said), dim=1)
        right = (predicted(model, tokens) == tokens[:, 1:])[:, half + 1 :]
        tally.add(float(right.sum()), right.numel())
    return tally


def load_exported(folder: Path) -> Llama:
    """Load an exported model, with its bfloat16 weights widened to float32."""
    model = Llama(Architecture())
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
    )
    return model


def main() -> None:
    """Print the figures of the model card."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.bundled.training.evaluate")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="exported model folder")
    add("--books-heldout", type=Path, required=True, help="folder of .txt files, or tar archive")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    add("--windows", type=int, help="windows per length; all of them when not given")
    add("--samples", type=int, default=100, help="passkey prompts per length")
    add("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_exported(given.model)
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as work:
        corpus = load_corpus(Path(work), "heldout", given.books_heldout, tokenizer)
    for length in given.lengths:
        found = passkey_accuracy(model, corpus, tokenizer, length, given.samples)
        bits = heldout_bits(model, corpus, tokenizer, length, num_windows=given.windows)
        print(
            f"length {length}: {bits.mean:.3f} bits per byte over {bits.count:,.0f} bytes, "
            f"passkey {found.total:.0f} of {found.count:.0f}, "
            f"induction {induction_accuracy(model, length, 8).mean:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
