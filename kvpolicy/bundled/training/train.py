"""The training loop of one process: resumable, paced by tokens and by the clock."""

import datetime
import signal
import time
from dataclasses import dataclass
from pathlib import Path

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
from kvpolicy.bundled.training.schedule import STAGES, rate_scale, stage_index
from kvpolicy.bundled.training.tasks import Tasks
from kvpolicy.bundled.training.wiring import wire


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run is started with.

    Progress is the larger of two shares: of `max_tokens`, and of the clock time between start
    and end. The clock ends after `minutes` of training, or at `until` (seconds since the epoch)
    when that is given, time spent paused or dead included.
    """

    books_train: Path
    books_heldout: Path
    work: Path
    out: Path
    processes: int = 2
    max_tokens: float = 100e6
    minutes: float = 600.0
    until: float | None = None
    tokens_per_step: int = 2048
    evaluate_every: float = 420.0
    checkpoint_every: float = 120.0
    seed: int = 0
    is_compiled: bool = True


@dataclass
class Progress:
    """Where the run stands; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    share: float = 0.0


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
        wire(self.model, settings.seed)
        self.optimiser = MuonAdam(self.model)
        self.progress = Progress()
        # Told by a signal, one process at a time; stopping once all have heard of it.
        self.is_told_to_stop = False
        self.is_stopping = False
        loss = self._weighted_loss
        self.loss = torch.compile(loss, dynamic=False) if settings.is_compiled else loss
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def run(self) -> bool:
        """Train to the end or to a signal; return whether the end was reached."""
        self._resume()
        stage = stage_index(self.progress.share)
        started = last = evaluated = saved = time.time()
        seconds_before = self.progress.seconds
        losses, tokens_before = [], self.progress.tokens
        while self.progress.share < 1.0:
            loss = self._step(stage, seconds_before + time.time() - started)
            losses.append(loss)
            now = time.time()
            due = self._agree(now - evaluated > self.settings.evaluate_every)
            if self.progress.step % 50 == 0:
                rate = (self.progress.tokens - tokens_before) / (now - last)
                self._log(f"loss {sum(losses) / len(losses):.3f}, {rate:,.0f} tokens/s")
                losses, last, tokens_before = [], now, self.progress.tokens
            reached = stage_index(self.progress.share)
            is_ending = reached != stage or self.progress.share >= 1.0 or self.is_stopping
            if is_ending or now - saved > self.settings.checkpoint_every:
                self._save()
                saved = now
            if self.is_stopping:
                return False
            if due or is_ending:
                self._evaluate(STAGES[stage].length)
                self._export()
                evaluated = last = time.time()
                tokens_before = self.progress.tokens
            stage = reached
        return True

    def _weighted_loss(
        self, tokens: Tensor, weights: Tensor, cosine: Tensor, sine: Tensor
    ) -> Tensor:
        losses = self.model.token_losses(tokens, cosine, sine)
        return (losses * weights).sum() / weights.sum()

    def _step(self, stage: int, seconds: float) -> float:
        """Take one step on one batch per process; return the loss averaged over them."""
        length, progress = STAGES[stage].length, self.progress
        count = max(1, self.settings.tokens_per_step // length)
        seed = [1, self.settings.seed, self.rank, progress.step]
        # One token more than the length, since the last is only a target.
        drawn = self.tasks.batch(STAGES[stage].mix, length + 1, count, seed)
        sizes = self.model.sizes
        cosine, sine = rotary_tables(length, sizes.head_dim, sizes.rope_theta)
        loss = self.loss(
            torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.weights[:, 1:]), cosine, sine
        )
        loss.backward()
        progress.seconds = seconds
        progress.tokens += count * length * self.settings.processes
        wish = self._share_done() if self.rank == 0 else 0.0
        mean_loss, stop, share = self._average_gradients(
            [loss.item(), float(self.is_told_to_stop), wish]
        )
        self.is_stopping = stop > 0
        progress.share = max(progress.share, share * self.settings.processes)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.scale = rate_scale(progress.share, progress.step)
        self.optimiser.step()
        self.model.zero_grad()
        progress.step += 1
        return mean_loss

    def _share_done(self) -> float:
        settings, progress = self.settings, self.progress
        left = settings.minutes * 60 - progress.seconds
        if settings.until is not None:
            left = settings.until - time.time()
        by_clock = progress.seconds / (progress.seconds + left) if left > 0 else 1.0
        return max(by_clock, progress.tokens / settings.max_tokens)

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

    def _agree(self, wish: bool) -> bool:
        """Return what rank 0 wishes."""
        flag = torch.tensor([wish])
        dist.broadcast(flag, src=0)
        return bool(flag.item())

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
            f"{clock}  {progress.share:6.1%}  stage {stage_index(progress.share) + 1}"
            f"  step {progress.step:,}  {progress.tokens / 1e6:.2f} M tokens  {message}"
        )
        print(line, flush=True)
        with (self.settings.work / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _stop(self, *_: object) -> None:
        self.is_told_to_stop = True
