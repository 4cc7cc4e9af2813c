"""What the model can do: bits per byte on held-out books, and finding what was stated earlier.

`python -m kvpolicy.bundled.training.evaluate --help` measures an exported model.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kvpolicy.bundled.training.corpus import Corpus, load_corpus
from kvpolicy.bundled.training.export import load
from kvpolicy.bundled.training.model import Llama, rotary_tables
from kvpolicy.bundled.training.retrieval import Retrieval, passkey, recall
from kvpolicy.bundled.training.tasks import Tasks
from kvpolicy.bundled.training.tokenizer import BOS_ID, NUM_SPECIAL, PAD_ID

BATCH_TOKENS = 8192
NUM_PAIRS = 16


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


def heldout_windows(
    corpus: Corpus, length: int, num_windows: int | None, share: Share = Share()
) -> Iterator[Tensor]:
    """Yield windows of `length` tokens, each behind its own BOS, in batches [B, T].

    Args:
        corpus: The books.
        length: Tokens per window, BOS included.
        num_windows: How many windows, spread evenly over the books; all of them when None.
        share: Which of them to yield.
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
    rows = max(1, BATCH_TOKENS // length)
    for first in range(0, len(starts), rows):
        windows = [corpus.tokens[start : start + body] for start in starts[first : first + rows]]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        yield torch.nn.functional.pad(tokens, (1, 0), value=BOS_ID)


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
    """Tally bits and bytes over windows of `length` tokens of the held-out books."""
    cosine, sine = rotary_tables(length - 1, model.sizes.head_dim, model.sizes.rope_theta)
    bytes_of, tally = token_bytes(tokenizer), Tally()
    for tokens in heldout_windows(corpus, length, num_windows, share):
        losses = model.token_losses(tokens, cosine, sine)
        tally.add(losses.sum().item() / math.log(2), float(bytes_of[tokens[:, 1:].numpy()].sum()))
    return tally


@torch.no_grad()
def predicted(model: Llama, tokens: Tensor) -> Tensor:
    """Return the likeliest next token at every position but the last, [B, T - 1]."""
    length = tokens.shape[1] - 1
    cosine, sine = rotary_tables(length, model.sizes.head_dim, model.sizes.rope_theta)
    hidden = model(tokens[:, :-1], cosine, sine)
    return (hidden @ model.embed_tokens.weight.mT).argmax(-1)


def accuracy(model: Llama, sequences: Iterable[Retrieval]) -> Tally:
    """Tally the answers of which every token is predicted."""
    tally = Tally()
    for sequence in sequences:
        guessed = predicted(model, torch.from_numpy(sequence.tokens)[None])[0].numpy()
        is_right = guessed == sequence.tokens[1:]  # of the token behind each position
        for answer in sequence.answers:
            first = answer.start - 1
            tally.add(float(is_right[first : first + answer.size].all()), 1)
    return tally


def passkey_accuracy(
    model: Llama,
    corpus: Corpus,
    tokenizer: Tokenizer,
    context: int,
    num_samples: int,
    *,
    share: Share = Share(),
) -> Tally:
    """Tally pass keys found."""
    samples = range(share.rank, num_samples, share.world)
    return accuracy(model, (passkey(corpus, tokenizer, context, sample) for sample in samples))


def recall_accuracy(
    model: Llama, tasks: Tasks, context: int, num_samples: int, *, share: Share = Share()
) -> Tally:
    """Tally pairs recalled, out of `NUM_PAIRS` per sample."""
    samples = range(share.rank, num_samples, share.world)
    return accuracy(
        model, (recall(tasks, context, sample, num_pairs=NUM_PAIRS) for sample in samples)
    )


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


def main() -> None:
    """Print the table of figures of the model card."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.bundled.training.evaluate")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="exported model folder")
    add("--books-heldout", type=Path, required=True, help="folder of .txt files, or tar archive")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    add("--windows", type=int, help="windows per length; all of them when not given")
    add("--samples", type=int, default=100, help="passkey prompts per length")
    add("--recalls", type=int, default=20, help="prompts of 16 pairs per length")
    add("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load(given.model)
    with tempfile.TemporaryDirectory() as work:
        corpus = load_corpus(Path(work), "heldout", given.books_heldout, tokenizer)
    tasks = Tasks(corpus, tokenizer)
    print(f"| context | bits per byte | bytes | passkey | {NUM_PAIRS}-pair recall | induction |")
    print("|---|---|---|---|---|---|")
    for length in given.lengths:
        found = passkey_accuracy(model, corpus, tokenizer, length, given.samples)
        recalled = recall_accuracy(model, tasks, length, given.recalls)
        bits = heldout_bits(model, corpus, tokenizer, length, num_windows=given.windows)
        print(
            f"| {length:,} | {bits.mean:.3f} | {bits.count:,.0f} "
            f"| {found.total:.0f} of {found.count:.0f} "
            f"| {recalled.total:.0f} of {recalled.count:.0f} "
            f"| {induction_accuracy(model, length, 8).mean:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
