"""The rows of one cache: which new tokens are real, and which rows advance in lockstep.

Padding has no position and no slot. The rows of a left-padded batch differ in length, so a
chunk of new columns is split into groups of rows that the core can advance together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy import KVPolicyError, PolicyError, UnsupportedError


@dataclass(frozen=True)
class Group:
    """Rows with equal prompts that have seen equally many tokens and get equally many.

    Attributes:
        rows: Their indices in the batch.
        columns: [rows, new tokens] columns of the chunk that hold their tokens.
    """

    rows: list[int]
    columns: list[list[int]]


@dataclass(frozen=True)
class Chunk:
    """The new columns of one forward.

    Attributes:
        num_columns: Columns, padding included.
        new_tokens: Real tokens per row.
        prompts: Tokens of each row's prompt; 0 where the policy does not set prompts apart.
        groups: Rows in lockstep; None if all rows advance together, by every column: one
            column, whatever their lengths, or several at equal lengths and prompts.
    """

    num_columns: int
    new_tokens: list[int]
    prompts: list[int]
    groups: list[Group] | None

    def columns(self) -> Iterator[tuple[int, list[int]]]:
        """Rows that have tokens, and the columns that hold them."""
        if self.groups is None:
            every = list(range(self.num_columns))
            yield from ((row, every) for row in range(len(self.new_tokens)))
            return
        for group in self.groups:
            yield from zip(group.rows, group.columns, strict=True)


@dataclass
class Batch:
    """What the layers of a cache share: its rows' lengths and the forward under way.

    Attributes:
        num_layers: Layers that every forward visits in order, also those that no policy rules.
        limit: Most tokens per row that the model's positions allow; None: any number.
        policy: The policy's spec, for messages.
        sets_prompts_apart: Whether the policy's law depends on the rows' prompts.
        has_windows: Whether layers attend to sliding windows, which are counted in columns.
        prompt_tokens: Tokens of the rows' prompts as the user gave them, of every row or each;
            None if the first forward is the prompt.
        prompts: What came of it, per row; empty before the first forward.
        forwards: Forwards done.
        tokens: Real tokens seen, per row; empty before the first forward.
        columns: Columns seen, padding included: what attention masks are indexed by.
    """

    num_layers: int
    limit: int | None
    policy: str
    sets_prompts_apart: bool = False
    has_windows: bool = False
    prompt_tokens: int | Sequence[int] | None = None
    prompts: list[int] = field(default_factory=list)
    forwards: int = 0
    tokens: list[int] = field(default_factory=list)
    columns: int = 0
    _chunk: Chunk | None = None
    _first: int = 0
    _next_layer: int | None = 0

    def __post_init__(self) -> None:
        """Refuse prompts of no possible length."""
        given = self.prompt_tokens
        counts = list(given) if isinstance(given, Iterable) else [0 if given is None else given]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise PolicyError(
                f"prompt_tokens must be a number of tokens, or one for each row, got {given!r}"
            )

    def begin(self, layer: int, shape: tuple[int, int], mask: Tensor | None) -> Chunk:
        """Say what a layer is to do in this forward; the first one to ask checks it all.

        Args:
            layer: The index of a layer under the policy.
            shape: Rows and columns, (B, Q).
            mask: None or [B, 1, Q, Q].

        Raises:
            UnsupportedError: The forward cannot be honoured; nothing has changed.
            KVPolicyError: The layers have lost step, because a forward failed midway.
        """
        self.require_turn(layer)
        chunk = self._chunk
        if chunk is None:
            chunk = self._plan(shape, mask)
            self._require_room(chunk)
            self._chunk, self._first = chunk, layer
        self._next_layer = None
        return chunk

    def require_positions(self, positions: Tensor) -> None:
        """Raise UnsupportedError unless tokens were rotated at the positions counted here.

        Attention between tokens sees distances only, so that an offset of a row, which padding
        makes, changes nothing. A memory turns keys back to before their rotation.

        Args:
            positions: [B or 1, Q] of the forward under way; those of padding do not matter.
        """
        chunk = self._chunk
        assert chunk is not None, "begin made it"
        given = positions.expand(len(chunk.new_tokens), -1).tolist()
        seen = self._seen(len(given))
        for row, columns in chunk.columns():
            got = [given[row][column] for column in columns]
            if got != list(range(seen[row], seen[row] + len(columns))):
                raise UnsupportedError(
                    f"{self.policy}: its memory needs tokens at their own positions, but row {row} "
                    f"has seen {seen[row]} tokens and goes on at {got[0]}; of padded rows pass "
                    "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), the new tokens' "
                    "columns of it, as generate() does"
                )

    def finish(self, layer: int) -> None:
        """Note that a layer is done; after the last one the rows have advanced."""
        self._next_layer = (layer + 1) % self.num_layers
        if self._next_layer == 0:
            chunk = self._chunk
            assert chunk is not None, "begin made it"
            seen = self._seen(len(chunk.new_tokens))
            self.tokens = [n + new for n, new in zip(seen, chunk.new_tokens, strict=True)]
            self.prompts = chunk.prompts
            self.forwards += 1
            self.columns += chunk.num_columns
            self._chunk = None

    def fail(self, layer: int) -> None:
        """Note that a layer failed and holds what it held before."""
        if layer == self._first:
            self._chunk, self._next_layer = None, 0

    def reset(self, prompt_tokens: int | Sequence[int] | None) -> None:
        """Forget the rows and whatever went wrong with them; new ones may bring new prompts."""
        self.prompt_tokens = prompt_tokens
        self.__post_init__()
        self.tokens, self.prompts, self.columns, self.forwards = [], [], 0, 0
        self._chunk, self._next_layer = None, 0

    def require_turn(self, layer: int) -> None:
        """Raise KVPolicyError unless a layer is the next to come."""
        if layer == 0:
            self.require_consistent()
            self._next_layer = 0
        if layer == self._next_layer:
            return
        raise KVPolicyError(
            f"layer {layer} came when the cache expected layer {self._next_layer}: the attention "
            "function never saw the layer between, or layers were skipped; use the cache with "
            "the model it was made for, with all its layers"
        )

    def require_consistent(self) -> None:
        """Raise KVPolicyError if a forward stopped after a layer under the policy took its tokens.

        Layers before that give back what they took when the next forward begins.
        """
        if self._chunk is not None:
            raise KVPolicyError(
                "the last forward with this cache failed midway, so its layers differ in length; "
                "call reset() and feed the tokens again, or go on with a copy made before"
            )

    def require_row(self, row: int) -> None:
        """Raise unless a row can be reported: IndexError if there is none of that number."""
        self.require_consistent()
        if self.tokens and not 0 <= row < len(self.tokens):
            raise IndexError(f"row {row} of a cache with {len(self.tokens)} rows")

    def require_rows(self, rows: int) -> None:
        """Raise UnsupportedError unless a forward has as many rows as those before."""
        if self.tokens and rows != len(self.tokens):
            raise UnsupportedError(
                f"the cache holds {len(self.tokens)} rows but the forward has {rows}; use one "
                "PolicyCache per batch, or reset() it"
            )

    def _seen(self, rows: int) -> list[int]:
        return self.tokens or [0] * rows

    def _plan(self, shape: tuple[int, int], mask: Tensor | None) -> Chunk:
        rows, queries = shape
        self.require_rows(rows)
        seen = self._seen(rows)
        real = None if mask is None else real_tokens(mask, rows, queries)
        if real is None or bool(real.all()):
            columns, is_padded = [list(range(queries))] * rows, False
        else:
            columns, is_padded = [row.nonzero()[:, 0].tolist() for row in real.cpu()], True
            self._require_whole_windows(queries, seen, columns)
        new_tokens = [len(row) for row in columns]
        prompts = self._prompts(queries, new_tokens)
        in_lockstep = queries == 1 or len(set(zip(seen, prompts, strict=True))) == 1
        groups = None if in_lockstep and not is_padded else _groups(seen, prompts, columns)
        return Chunk(queries, new_tokens, prompts, groups)

    def _require_whole_windows(
        self, queries: int, seen: list[int], columns: list[list[int]]
    ) -> None:
        """Raise UnsupportedError if a sliding window would span padding between tokens."""
        if not self.has_windows:
            return
        for row, (before, own) in enumerate(zip(seen, columns, strict=True)):
            padding = queries - len(own)
            if own != list(range(padding, queries)) or (before and padding):
                raise UnsupportedError(
                    f"{self.policy}: row {row} has padding between its tokens, which transformers "
                    "counts in the sliding windows of this model, so that the row's result would "
                    "depend on its batch; pad on the left of whole rows, or feed rows alone"
                )

    def _prompts(self, queries: int, new_tokens: list[int]) -> list[int]:
        """Tokens of each row's prompt, in a forward of so many columns and real tokens."""
        given, rows = self.prompt_tokens, len(new_tokens)
        if not self.sets_prompts_apart:
            return [0] * rows
        if given is None:
            self._require_known_end(queries)
            return self.prompts or new_tokens
        prompts = [given] * rows if isinstance(given, int) else list(given)
        if len(prompts) != rows:
            raise UnsupportedError(
                f"{self.policy}: prompt_tokens gives the prompts of {len(prompts)} rows but the "
                f"forward has {rows}; give one length per row, or one for all"
            )
        return prompts

    def _require_known_end(self, queries: int) -> None:
        """Raise UnsupportedError if the first forward may not have been the whole prompt."""
        if self.forwards == 1 and queries > 1:
            raise UnsupportedError(
                f"{self.policy}: the first forward of a PolicyCache is its prompt, but the second "
                f"one brings {queries} columns at once, which may be more of the prompt, as under "
                "prefill_chunk_size, or a new turn; say where the prompt ends with "
                "PolicyCache(..., prompt_tokens=...)"
            )

    def _require_room(self, chunk: Chunk) -> None:
        seen = self._seen(len(chunk.new_tokens))
        longest = max(n + new for n, new in zip(seen, chunk.new_tokens, strict=True))
        if self.limit is not None and longest > self.limit:
            raise UnsupportedError(
                f"{self.policy}: a row would reach {longest} tokens, past the model's "
                f"max_position_embeddings={self.limit}; add rope_beyond=allow to let positions "
                "run on, or use rope=reindex where the policy has it"
            )


def real_tokens(mask: Tensor, rows: int, queries: int) -> Tensor:
    """Read from a mask of the new tokens which are not padding; [B, Q] bool.

    Args:
        mask: [B or 1, 1, Q, Q], bool or additive float.
        rows: B.
        queries: Q.

    Raises:
        UnsupportedError: It is not a causal mask with padding.
    """
    if mask.shape[0] in (1, rows) and mask.shape[1:] == (1, queries, queries):
        visible = mask if mask.dtype == torch.bool else mask == 0
        real = visible.diagonal(dim1=-2, dim2=-1)[:, 0]  # [B or 1, Q]
        causal = torch.ones(queries, queries, dtype=torch.bool, device=mask.device).tril()
        if torch.equal(visible[:, 0], causal & real[:, None]):
            return real.expand(rows, -1)
    raise UnsupportedError(
        f"got an attention mask of shape {tuple(mask.shape)} that is not causal attention with "
        f"padding over the {queries} new tokens; pass a 2D mask [batch, history + new tokens]"
    )


def _groups(seen: list[int], prompts: list[int], columns: list[list[int]]) -> list[Group]:
    """Collect the rows with tokens by (tokens seen, tokens of the prompt, new tokens)."""
    groups: dict[tuple[int, int, int], Group] = {}
    for row, (before, prompt, own) in enumerate(zip(seen, prompts, columns, strict=True)):
        if own:
            group = groups.setdefault((before, prompt, len(own)), Group([], []))
            group.rows.append(row)
            group.columns.append(own)
    return list(groups.values())
