"""What the heads attend to: attention sinks and retrieval heads, measured on held-out books.

`python -m kvpolicy.bundled.training.heads --help` prints the table of the model card.

A head's sink mass is the share of its attention on BOS, averaged over queries. Its retrieval score
(after https://arxiv.org/abs/2404.15574) is the share of answer tokens that are about to be copied
while the head attends most, of all positions, to that very token in the statement.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy.bundled.training.corpus import load_corpus
from kvpolicy.bundled.training.evaluate import NUM_PAIRS, heldout_windows
from kvpolicy.bundled.training.export import load
from kvpolicy.bundled.training.model import Llama, rotary_tables
from kvpolicy.bundled.training.retrieval import Retrieval, passkey, recall
from kvpolicy.bundled.training.tasks import Tasks

# Earlier queries have so few keys to choose from that BOS gets much in any case.
FIRST_QUERY = 128


@torch.no_grad()
def attention_weights(model: Llama, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the attention weights of each layer over `tokens` [B, T], each [B, H, T, T]."""
    sizes, length = model.sizes, tokens.shape[1]
    cosine, sine = rotary_tables(length, sizes.head_dim, sizes.rope_theta)
    is_future = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden = model.embed_tokens(tokens)
    for index in range(sizes.num_layers):
        layer = model.layer(index)
        heads = layer.self_attn.project(layer.input_layernorm(hidden), cosine, sine)
        scores = heads.query @ heads.key.mT / math.sqrt(sizes.head_dim)
        yield scores.masked_fill(is_future, -math.inf).softmax(-1)
        hidden = layer(hidden, cosine, sine)


def sink_mass(model: Llama, windows: Iterable[Tensor]) -> Tensor:
    """Return the mean attention on BOS from position 128 on, [layers, H]; rows count equally."""
    rows = []
    for tokens in windows:
        layers = [
            weights[:, :, FIRST_QUERY:, 0].mean(-1) for weights in attention_weights(model, tokens)
        ]
        rows.append(torch.stack(layers, dim=1))  # [B, layers, H]
    return torch.cat(rows).mean(0)


def retrieval_score(model: Llama, sequences: Iterable[Retrieval]) -> Tensor:
    """Return the share of answer tokens that heads look up in the statement, [layers, H].

    The first token of an answer of several is left out: it is the space before a number.
    """
    hits = torch.zeros(model.sizes.num_layers, model.sizes.num_query_heads)
    count = 0
    for sequence in sequences:
        queries, sources = [], []
        for answer in sequence.answers:
            for offset in range(min(1, answer.size - 1), answer.size):
                queries.append(answer.start + offset - 1)
                sources.append([start + offset for start in answer.stated])
        count += len(queries)
        tokens = torch.from_numpy(sequence.tokens)[None]
        for index, weights in enumerate(attention_weights(model, tokens)):
            looked_at = weights[0, :, queries].argmax(-1)  # [H, queries]
            for query, stated in enumerate(sources):
                hits[index] += torch.isin(looked_at[:, query], torch.tensor(stated)).float()
    return hits / count


def table(columns: dict[str, Tensor]) -> str:
    """Return a Markdown table with a row per layer and, per column, the figures of its heads."""
    lines = [f"| layer | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for index, figures in enumerate(zip(*columns.values(), strict=True)):
        cells = (" ".join(f"{figure:.2f}" for figure in row.tolist()) for row in figures)
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of heads of the model card."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.bundled.training.heads")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="exported model folder")
    add("--books-heldout", type=Path, required=True, help="folder of .txt files, or tar archive")
    add("--length", type=int, default=1024, help="tokens per window and prompt")
    add("--windows", type=int, default=16, help="windows for the mass on BOS")
    add("--samples", type=int, default=16, help="passkey prompts, and prompts of 16 pairs")
    add("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load(given.model)
    with tempfile.TemporaryDirectory() as work:
        corpus = load_corpus(Path(work), "heldout", given.books_heldout, tokenizer)
    tasks, samples = Tasks(corpus, tokenizer), range(given.samples)
    mass = sink_mass(model, heldout_windows(corpus, given.length, given.windows))
    passkeys = (passkey(corpus, tokenizer, given.length, sample) for sample in samples)
    recalls = (recall(tasks, given.length, sample, num_pairs=NUM_PAIRS) for sample in samples)
    print(
        table(
            {
                "mass on BOS per head": mass,
                "passkey": retrieval_score(model, passkeys),
                f"{NUM_PAIRS}-pair recall": retrieval_score(model, recalls),
            }
        )
    )
    print(f"\nmean mass on BOS: {mass.mean():.3f}; behind layer 0: {mass[1:].mean():.3f}")


if __name__ == "__main__":
    main()
