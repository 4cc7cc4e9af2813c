"""Starting the training processes, and passing signals on to them."""

import datetime
import os
import signal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from kvpolicy.bundled.training.corpus import load_corpus, load_tokenizer
from kvpolicy.bundled.training.model import Architecture
from kvpolicy.bundled.training.train import Settings, Trainer


def work(rank: int, settings: Settings) -> None:
    """Run one training process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(settings.work / 'meeting').resolve()}",
        rank=rank,
        world_size=settings.processes,
        # A run may be paused for hours with SIGSTOP.
        timeout=datetime.timedelta(hours=24),
    )
    is_done = Trainer(settings, rank).run()
    dist.destroy_process_group()
    if rank == 0:
        print("done" if is_done else "stopped; start again to go on", flush=True)


def launch(settings: Settings) -> int:
    """Prepare the corpus once, then train in as many processes as asked; return the exit code."""
    settings.work.mkdir(parents=True, exist_ok=True)
    (settings.work / "meeting").unlink(missing_ok=True)
    tokenizer = load_tokenizer(settings.work, settings.books_train, Architecture().vocabulary)
    load_corpus(settings.work, "train", settings.books_train, tokenizer)
    load_corpus(settings.work, "heldout", settings.books_heldout, tokenizer)
    # glibc would otherwise return large blocks to the system after every use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4294967296")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8589934592")
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=work, args=(rank, settings)) for rank in range(settings.processes)
    ]
    for child in children:
        child.start()

    def forward(number: int, _: object) -> None:
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    pids = [os.getpid(), *(child.pid for child in children)]
    (settings.work / "pids").write_text("\n".join(map(str, pids)) + "\n", encoding="utf-8")
    for child in children:
        child.join()
    return max(abs(child.exitcode or 0) for child in children)
