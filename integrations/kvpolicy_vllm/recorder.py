"""Records live requests: what their attention receives and returns, into one trace each.

A request under a policy that keeps everything has all its tokens in its slots, in order. Its
rows of a forward go from the layers to a `TraceWriter`, which copies them and writes in the
background. A preempted request computes its first tokens again: those that were written are
passed over, so that its trace goes on where it stopped.

Nothing of this may stop the engine: a recording that fails is given up, logged and reported.
"""

import re
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvpolicy.trace import Header
from kvpolicy.trace.frames import CHUNK_ROWS
from kvpolicy.trace.header import KINDS
from kvpolicy_vllm.book import external_id
from kvpolicy_vllm.capture import SUFFIX, Capture
from kvpolicy_vllm.recording import QUEUE_BYTES, RecordedRow, Recording
from kvpolicy_vllm.rows import Row

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import InputBatch

logger = init_logger(__name__)

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]|^\.+")
"""What of a request's id, which clients may choose, does not go into the name of a file."""

_MAX_NAME = 120

_MAX_REPORTED = 4096
"""Traces and faults that are remembered, the latest ones."""


class Recorder:
    """Chooses requests and writes their traces.

    Args:
        capture: What to record, checked against the model.
        header: What every trace says about itself.
    """

    def __init__(self, capture: Capture, header: Header) -> None:
        self.capture = capture
        self.header = header
        self._limit = _most_at_once(capture, header)
        self._names: set[str] = set()
        self._num_met = self._num_begun = 0
        self._known: set[str] = set()
        self._open: dict[str, Recording] = {}
        # Completing a file waits for the disk, which requests that go on should not.
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="kvpolicy-capture")
        self._closing: dict[str, Future[Path]] = {}
        self._finished: deque[str] = deque(maxlen=_MAX_REPORTED)
        self._faults: deque[str] = deque(maxlen=_MAX_REPORTED)
        weakref.finalize(self, _close_all, self._open)

    def meet(self, request_id: str, wish: bool | None) -> None:
        """Decide about a request that can be recorded, in the order in which requests arrive.

        Args:
            request_id: Its internal id; met again when a session continues, which changes nothing.
            wish: Whether it asks to be recorded (True) or not to be (False).
        """
        if request_id in self._known:
            return
        self._known.add(request_id)
        every, self._num_met = self.capture.every, self._num_met + 1
        is_sampled = every is not None and (self._num_met - 1) % every == 0
        if wish is False or not (wish or is_sampled):
            return
        self._collect()
        most = self.capture.max_requests
        if most is not None and self._num_begun >= most:
            logger.info_once("kvpolicy: capture: max_requests=%d reached, no further traces", most)
        elif len(self._open) + len(self._closing) >= self._limit:
            logger.warning_once(
                "kvpolicy: capture: %d requests are being recorded, which is what max_memory "
                "allows; others meanwhile are not",
                self._limit,
            )
        else:
            self._num_begun += 1
            self._open[request_id] = Recording(self._new_name(request_id))

    def plan(
        self, rows: Sequence[Row], block_table: Tensor, batch: "InputBatch"
    ) -> list[RecordedRow]:
        """Those rows of a forward that have something to record."""
        planned: list[RecordedRow] = []
        for row in rows if self._open else ():
            request_id = batch.req_ids[row.index]
            recording = self._open.get(request_id)
            if recording is None:
                continue
            if recording.writer is None and not self._begin(
                request_id, recording, row.index, batch
            ):
                continue
            most, begun = self.capture.max_tokens, min(recording.written.values())
            if begun == most:
                self._complete(request_id)
                continue
            end = row.total if most is None else min(row.total, most)
            if begun < end:
                planned.append(self._planned(recording, row, end, block_table, batch))
        return planned

    def _planned(
        self,
        recording: Recording,
        row: Row,
        end: int,
        block_table: Tensor,
        batch: "InputBatch",
    ) -> RecordedRow:
        request_id, ids = batch.req_ids[row.index], None
        if recording.has_ids:
            ids = torch.from_numpy(batch.token_ids_cpu[row.index, row.seen : end].astype("uint32"))
        return RecordedRow(
            recording=recording,
            fail=lambda error: self._give_up(request_id, error),
            first_token=row.first_token,
            seen=row.seen,
            end=end,
            blocks=block_table[row.index].long(),
            kv_heads=list(self.header.kv_heads),
            ids=ids,
        )

    def finish(self, request_ids: Iterable[str]) -> None:
        """Complete the traces of requests that run no further, in the background."""
        for request_id in request_ids:
            self._known.discard(request_id)
            self._complete(request_id)

    def report(self, running: Collection[str]) -> dict[str, list[str]]:
        """Complete the traces of requests that do not run, and say what there is.

        Faults are reported once.
        """
        for request_id in [name for name in self._open if name not in running]:
            self._complete(request_id)
        self._collect(wait=True)
        faults = list(self._faults)
        self._faults.clear()
        return {"finished": list(self._finished), "faults": faults}

    def close(self) -> None:
        """Complete all traces; nothing is recorded afterwards."""
        self.finish(list(self._open))
        self._collect(wait=True)
        self._limit = 0

    def _complete(self, request_id: str) -> None:
        """Let a request's file be completed if it is still open."""
        recording = self._open.pop(request_id, None)
        if recording is not None and recording.writer is not None:
            self._closing[recording.name] = self._closer.submit(recording.close)

    def _begin(self, request_id: str, recording: Recording, row: int, batch: "InputBatch") -> bool:
        """Create a recording's file; whether that worked."""
        prompt_len = int(batch.num_prompt_tokens[row])
        # A prompt may consist of embeddings, which have no ids.
        is_text = bool(batch.is_token_ids[row, :prompt_len].all())
        recording.has_ids = self.capture.token_ids and is_text
        path = Path(self.capture.directory) / f"{recording.name}{SUFFIX}"
        try:
            recording.open(path, self.header, prompt_len)
        except Exception as error:
            self._give_up(request_id, error)
            return False
        return True

    def _give_up(self, request_id: str, error: Exception) -> None:
        """End a recording that failed; what can be recovered stays on the disk."""
        recording = self._open.pop(request_id, None)
        if recording is None:
            return
        recording.written.clear()
        if recording.writer is not None:
            with suppress(Exception):  # the first error is the one to tell
                recording.writer.__exit__(type(error), error, error.__traceback__)
        self._note(recording.name, error)

    def _collect(self, *, wait: bool = False) -> None:
        """Take note of files that were completed, in the order in which requests finished."""
        for name, future in list(self._closing.items()):
            if not (wait or future.done()):
                break
            del self._closing[name]
            error = future.exception()
            if error is None:
                self._finished.append(str(future.result()))
            else:
                self._note(name, error)

    def _note(self, name: str, error: BaseException) -> None:
        self._faults.append(f"request {name} was not recorded: {type(error).__name__}: {error}")
        logger.error("kvpolicy: capture: %s", self._faults[-1])

    def _new_name(self, request_id: str) -> str:
        """A file's name for a request, which nobody else has."""
        stem = _UNSAFE.sub("_", external_id(request_id))[:_MAX_NAME]
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name)
        return name


def _most_at_once(capture: Capture, header: Header) -> int:
    """Requests that may be recorded at the same time, at least one.

    A writer keeps the chunk being filled of every layer and kind, and what waits for the disk.
    """
    token = sum(header.row_bytes(kind) for kind in KINDS) * len(header.layers)
    return max(1, capture.max_memory // (CHUNK_ROWS * token + QUEUE_BYTES))


def _close_all(recordings: dict[str, Recording]) -> None:
    """Complete what is open when an engine goes away without being shut down."""
    for recording in recordings.values():
        if recording.writer is not None:
            try:
                recording.close()
            except Exception as error:
                logger.error("kvpolicy: capture: request %s: %s", recording.name, error)
    recordings.clear()
