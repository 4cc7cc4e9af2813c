"""The training loop of one process: resumable, paced by tokens."""

import datetime
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kvpolicy.bundled.training.corpus import load_corpus, load_tokenizer
from kvpolicy.bundled.training.evaluate import (
    Share,
    Tally,
    heldout_bits,
    induction_accuracy,
    passkey_accuracy,
    recall_accuracy,
)
from kvpolicy.bundled.training.export import export
from kvpolicy.bundled.training.model import Architecture, Llama, rotary_tables
from kvpolicy.bundled.training.optimiser import MuonAdam
from kvpolicy.bundled.training.schedule import STAGES, cost_scale, rate_scale, stage_index
from kvpolicy.bundled.training.tasks import Tasks
from kvpolicy.bundled.training.wiring import wire

# Enough to estimate a mean over all queries.
NUM_QUERIES = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run is started with.

    The schedule follows the share of `max_tokens` seen, so that how fast the machine is, and how
    often the run is stopped, changes nothing. Every `evaluate_every` tokens the log tells what the
    model can do, and the model is exported. Attention to others than BOS costs `attention_cost`
    nats per token if all heads give all of theirs. Matrix products are computed in bfloat16 unless
    `is_exact`; weights, gradients and everything else stay in float32.
    """

    books_train: Path
    books_heldout: Path
    work: Path
    out: Path
    processes: int = 2
    max_tokens: float = 16e6
    tokens_per_step: int = 2048
    evaluate_every: int = 1_000_000
    checkpoint_seconds: float = 120.0
    seed: int = 0
    has_sinks: bool = True
    attention_cost: float = 0.03
    is_exact: bool = False
    is_compiled: bool = True


@dataclass
class Progress:
    """Where the run stands; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0


class Trainer:
    """One of `settings.processes` equal processes; rank 0 also writes files and the log."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.tokenizer = load_tokenizer(
            settings.work, settings.books_train, Architecture().vocabulary
        )
        self.train = load_corpus(settings.work, "train", settings.books_train, self.tokenizer)
        self.heldout = load_corpus(settings.work, "heldout", settings.books_heldout, self.tokenizer)
        self.tasks = Tasks(self.train, self.tokenizer)
        self.model = Llama(Architecture())
        self.model.initialise(settings.seed)
        wire(self.model, settings.seed, has_sinks=settings.has_sinks)
        self.optimiser = MuonAdam(self.model)
        self.progress = Progress()
        # Told by a signal, one process at a time; stopping once all have heard of it.
        self.is_told_to_stop = False
        self.is_stopping = False
        if settings.is_compiled:
            self.model.compile_parts()
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def run(self) -> bool:
        """Train to the end or to a signal; return whether the end was reached."""
        self._resume()
        stage = stage_index(self._share_done())
        last = saved = time.time()
        losses, tokens_before = [], self.progress.tokens
        evaluated = self.progress.tokens
        while self._share_done() < 1.0:
            losses.append(self._step(stage))
            now = time.time()
            if self.progress.step % 50 == 0:
                rate = (self.progress.tokens - tokens_before) / (now - last)
                self._log(f"loss {sum(losses) / len(losses):.3f}, {rate:,.0f} tokens/s")
                losses, last, tokens_before = [], now, self.progress.tokens
            reached = stage_index(self._share_done())
            is_ending = reached != stage or self._share_done() >= 1.0 or self.is_stopping
            if is_ending or now - saved > self.settings.checkpoint_seconds:
                self._save()
                saved = now
            if self.is_stopping:
                return False
            if is_ending or self.progress.tokens - evaluated >= self.settings.evaluate_every:
                self._evaluate(STAGES[stage].length)
                self._export()
                last = time.time()
                evaluated = tokens_before = self.progress.tokens
            stage = reached
        return True

    def loss(
        self,
        tokens: Tensor,
        weights: Tensor,
        cosine: Tensor,
        sine: Tensor,
        rows: Tensor,
        cost: float,
    ) -> Tensor:
        """Return the weighted mean of next-token losses, plus `cost` times the heads' activity.

        Args:
            tokens: [B, T + 1].
            weights: Of the tokens as targets, [B, T].
            cosine: [T, D].
            sine: [T, D].
            rows: Positions of the queries that stand for all in measuring activity, [R].
            cost: In nats per token.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.settings.is_exact):
            losses, activity = self.model.losses_and_activity(tokens, cosine, sine, rows)
        mean = (losses * weights).sum() / weights.sum()
        return mean + cost * activity

    def _step(self, stage: int) -> float:
        """Take one step on one batch per process; return the loss averaged over them."""
        length, progress = STAGES[stage].length, self.progress
        count = max(1, self.settings.tokens_per_step // length)
        seed = [1, self.settings.seed, self.rank, progress.step]
        # One token more than the length, since the last is only a target.
        drawn = self.tasks.batch(STAGES[stage].mix, length + 1, count, seed)
        sizes = self.model.sizes
        cosine, sine = rotary_tables(length, sizes.head_dim, sizes.rope_theta)
        rows = torch.from_numpy(np.random.default_rng(seed).integers(length, size=NUM_QUERIES))
        loss = self.loss(
            torch.from_numpy(drawn.tokens),
            torch.from_numpy(drawn.weights[:, 1:]),
            cosine,
            sine,
            rows,
            self.settings.attention_cost * cost_scale(self._share_done()),
        )
        loss.backward()
        progress.tokens += count * length * self.settings.processes
        mean_loss, stop = self._average_gradients([loss.item(), float(self.is_told_to_stop)])
        self.is_stopping = stop > 0
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.scale = rate_scale(self._share_done(), progress.step)
        self.optimiser.step()
        self.model.zero_grad()
        progress.step += 1
        return mean_loss

    def _share_done(self) -> float:
        return self.progress.tokens / self.settings.max_tokens

    def _average_gradients(self, extra: list[float]) -> list[float]:
        """Average all gradients, and the numbers in `extra`, over the processes."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(extra)])
        dist.all_reduce(flat)
        flat /= self.settings.processes
        parts = flat.split([*(g.numel() for g in gradients), len(extra)])
        for gradient, part in zip(gradients, parts, strict=False):
            gradient.copy_(part.view_as(gradient))
        return parts[-1].tolist()

    def _evaluate(self, length: int) -> None:
        share = Share(rank=self.rank, world=self.settings.processes)
        num_windows = max(8, 32_768 // length)
        tallies = {
            "bits/byte": heldout_bits(
                self.model, self.heldout, self.tokenizer, length,
                num_windows=num_windows, share=share,
            ),
            "passkey": passkey_accuracy(
                self.model, self.heldout, self.tokenizer, length, 24, share=share
            ),
            "recall": recall_accuracy(self.model, self.tasks, length, 8, share=share),
            "induction": induction_accuracy(self.model, length, 8, share=share),
        }  # fmt: skip
        told = "  ".join(f"{name} {self._sum(tally).mean:.3f}" for name, tally in tallies.items())
        self._log(f"at length {length}: {told}")

    def _sum(self, tally: Tally) -> Tally:
        both = torch.tensor([tally.total, tally.count], dtype=torch.float64)
        dist.all_reduce(both)
        return Tally(*both.tolist())

    def _export(self) -> None:
        if self.rank == 0:
            export(self.model, self.tokenizer, self.settings.out)

    def _save(self) -> None:
        if self.rank != 0:
            return
        path = self.settings.work / "checkpoint.pt"
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": vars(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _resume(self) -> None:
        path = self.settings.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])
        self._log("resumed")

    def _log(self, message: str) -> None:
        if self.rank != 0:
            return
        progress = self.progress
        clock = datetime.datetime.now().strftime("%H:%M:%S")
        line = (
            f"{clock}  {self._share_done():6.1%}  stage {stage_index(self._share_done()) + 1}"
            f"  step {progress.step:,}  {progress.tokens / 1e6:.2f} M tokens  {message}"
        )
        print(line, flush=True)
        with (self.settings.work / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _stop(self, *_: object) -> None:
        self.is_told_to_stop = True
