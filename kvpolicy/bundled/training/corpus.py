"""Books: reading them from a folder or an archive, and keeping them as token ids."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvpolicy.bundled.training.tokenizer import train_tokenizer

TOKENIZER_SAMPLE = 200_000


def read_books(source: Path) -> Iterator[str]:
    """Yield the books of a folder of `.txt` files or of a tar archive, in order of name."""
    if source.is_dir():
        for path in sorted(source.glob("*.txt")):
            yield path.read_text(encoding="utf-8")
        return
    with tarfile.open(source) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            stream = archive.extractfile(member) if member.name.endswith(".txt") else None
            if stream is not None:
                yield stream.read().decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The books as one array of token ids; book i is the half-open range [starts[i], starts[i+1]).

    `num_bytes` counts the UTF-8 bytes of all books, for bits per byte.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int

    def book(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def num_books(self) -> int:
        return len(self.starts) - 1


def load_tokenizer(work: Path, books: Path, vocabulary: int) -> Tokenizer:
    """Load the tokenizer kept in `work`, or train it on the beginning of every book."""
    path = work / "tokenizer.json"
    if not path.exists():
        texts = (book[:TOKENIZER_SAMPLE] for book in read_books(books))
        train_tokenizer(texts, vocabulary).save(str(path))
    return Tokenizer.from_file(str(path))


def load_corpus(work: Path, name: str, books: Path, tokenizer: Tokenizer) -> Corpus:
    """Load the encoded books kept in `work` under `name`, or encode them."""
    path = work / f"{name}.npz"
    if not path.exists():
        encoded, num_bytes = [], 0
        for book in read_books(books):
            ids = tokenizer.encode(book, add_special_tokens=False).ids
            encoded.append(np.array(ids, dtype=np.uint16))
            num_bytes += len(book.encode("utf-8"))
        starts = np.cumsum([0, *map(len, encoded)])
        np.savez(path, tokens=np.concatenate(encoded), starts=starts, num_bytes=num_bytes)
    with np.load(path) as kept:
        return Corpus(
            tokens=kept["tokens"], starts=kept["starts"], num_bytes=int(kept["num_bytes"])
        )
