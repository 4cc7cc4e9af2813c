"""One request's trace in the making, and a forward's share of it.

Axes: T tokens of the batch, Q tokens of a row, H query heads, H_kv KV heads, D head dimension,
n blocks of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kvpolicy.trace import Header, TraceWriter
from kvpolicy.trace.header import TOKENS
from kvpolicy_vllm.execution import LayerBatch, log_sum_exp
from kvpolicy_vllm.pages import Pages

QUEUE_BYTES = 16 << 20
"""Bytes of a recording that may wait for the disk before the forward waits for it."""


@dataclass
class Recording:
    """The trace of one request while it is written.

    Attributes:
        name: The file's name without its suffix.
        writer: Where rows go; None before the request's first forward.
        written: Tokens written, by layer.
        has_ids: Whether token ids are recorded.
    """

    name: str
    writer: TraceWriter | None = None
    written: dict[int, int] = field(default_factory=dict)
    has_ids: bool = False

    def open(self, path: Path, header: Header, prompt_len: int) -> None:
        """Create the file."""
        self.writer = TraceWriter(path, header, queue_bytes=QUEUE_BYTES)
        self.writer.begin(prompt_len=prompt_len, source=f"vllm request {self.name}")
        self.written = dict.fromkeys(header.layers, 0)

    def close(self) -> Path:
        """Complete the file; whatever cannot be completed stays beside it, for a repair.

        Raises:
            TraceError: It cannot be completed.
        """
        assert self.writer is not None, "only recordings that were opened are closed"
        with self.writer as writer:
            return writer.close()


class RecordedRow(NamedTuple):
    """A recorded request's share of a forward.

    Attributes:
        recording: Where it goes.
        fail: Gives the recording up.
        first_token: Index of its first token in the batch.
        seen: Position of that token.
        end: Position past the last token to record.
        blocks: [n] blocks that hold its tokens.
        kv_heads: KV heads to record.
        ids: [end - seen] uint32 token ids; None if they are not recorded.
    """

    recording: Recording
    fail: Callable[[Exception], None]
    first_token: int
    seen: int
    end: int
    blocks: Tensor
    kv_heads: list[int]
    ids: Tensor | None

    def record(self, layer: int, batch: LayerBatch, pages: Pages, scale: float) -> None:
        """Write what a layer's attention received and returned, where that layer is recorded.

        Args:
            layer: Index of the layer.
            batch: The whole batch, attended.
            pages: The layer's pages, the batch's tokens included.
            scale: Factor on query-key products.
        """
        start = max(self.recording.written.get(layer, self.end), self.seen)
        if start >= self.end:
            return
        try:
            self._write(layer, start, batch, pages, scale)
        except Exception as error:
            self.fail(error)
        self.recording.written[layer] = self.end

    def _write(self, layer: int, start: int, batch: LayerBatch, pages: Pages, scale: float) -> None:
        """Write the tokens at positions [start, end)."""
        writer = self.recording.writer
        assert writer is not None, "opened when the forward was planned"
        tokens = slice(
            self.first_token + start - self.seen, self.first_token + self.end - self.seen
        )
        num_heads = batch.key.shape[1]

        def query_heads(x: Tensor) -> Tensor:
            return x[tokens].unflatten(1, (num_heads, -1))[:, self.kv_heads].flatten(1, 2)

        query = query_heads(batch.query)  # [Q, H, D]
        rows = {
            "q": query,
            "k": batch.key[tokens][:, self.kv_heads],
            "v": batch.value[tokens][:, self.kv_heads],
            "lse": log_sum_exp(query, pages, self.blocks, self.kv_heads, seen=start, scale=scale),
            "out": query_heads(batch.output),
        }
        for kind, x in rows.items():
            writer.append(0, layer, kind, start, x.transpose(0, 1))
        if self.ids is not None and layer == writer.header.layers[0]:
            writer.append(0, None, TOKENS, start, self.ids[start - self.seen :])
