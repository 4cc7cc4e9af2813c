"""The training loop: stopping and going on changes nothing, and what it exports can be loaded."""

import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kvpolicy.bundled.training import schedule, train
from kvpolicy.bundled.training.evaluate import Tally
from kvpolicy.bundled.training.export import load
from kvpolicy.bundled.training.heads import attention_weights
from kvpolicy.bundled.training.optimiser import orthogonalise
from kvpolicy.bundled.training.schedule import Stage
from kvpolicy.bundled.training.tasks import Mix
from kvpolicy.bundled.training.train import Settings, Trainer

STAGES = (Stage(until=1.0, length=64, mix=Mix(books=0.4, facts=0.2, key_values=0.2, copies=0.2)),)


@pytest.fixture
def start(tmp_path, monkeypatch, corpus, tokenizer):
    """Return a function that starts a trainer, alone in its process group, on short sequences."""
    for module in (schedule, train):
        monkeypatch.setattr(module, "STAGES", STAGES)
    for name in ("heldout_bits", "passkey_accuracy", "recall_accuracy", "induction_accuracy"):
        monkeypatch.setattr(train, name, lambda *_, **__: Tally(1.0, 1.0))
    is_alone = not dist.is_initialized()  # vLLM leaves a group, of this process alone too
    if is_alone:
        meeting = f"file://{tmp_path / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)

    def trainer(name, **options):
        work = tmp_path / name
        if not work.exists():
            work.mkdir()
            tokenizer.save(str(work / "tokenizer.json"))
            for kind in ("train", "heldout"):
                np.savez(
                    work / f"{kind}.npz",
                    tokens=corpus.tokens,
                    starts=corpus.starts,
                    num_bytes=corpus.num_bytes,
                )
        settings = Settings(
            books_train=work,
            books_heldout=work,
            work=work,
            out=work / "model",
            processes=1,
            tokens_per_step=128,
            is_compiled=False,
            **options,
        )
        return Trainer(settings, 0)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield trainer
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if is_alone:
        dist.destroy_process_group()


def test_a_run_that_was_stopped_ends_with_the_same_weights(start):
    """Six steps in one go equal two steps, a stop, and four more from the checkpoint."""
    straight = start("straight", max_tokens=6 * 128)
    assert straight.run()
    stopped = start("stopped", max_tokens=6 * 128)
    stop_at_second = stopped.optimiser.step

    def step():
        stop_at_second()
        if stopped.progress.step == 0:
            # As the signal handler does; heard of in the next step.
            stopped.is_told_to_stop = True

    stopped.optimiser.step = step
    assert not stopped.run()
    assert stopped.progress.step == 2
    resumed = start("stopped", max_tokens=6 * 128)
    assert resumed.run()
    for name, weight in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0)


def test_what_is_exported_is_the_trained_model_in_bfloat16(start):
    """Reading the folder back gives the weights rounded, and the same sizes."""
    trainer = start("one", max_tokens=128)
    trainer.run()
    model, _ = load(trainer.settings.out)
    assert model.sizes == trainer.model.sizes
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], weight.bfloat16().float(), rtol=0, atol=0
        )


def test_bfloat16_gradients_point_where_float32_ones_do(start):
    """Computing in bfloat16 changes a step's direction by rounding only."""
    gradients = []
    for is_exact in (True, False):
        trainer = start(f"exact-{is_exact}", max_tokens=128, is_exact=is_exact)
        drawn = trainer.tasks.batch(STAGES[0].mix, 65, 8, [0])
        tables = train.rotary_tables(64, 64, trainer.model.sizes.rope_theta)
        batch = torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.weights[:, 1:])
        trainer.loss(*batch, *tables, torch.arange(0, 64, 8), 0.02).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_activity_is_the_attention_that_bos_does_not_get(start):
    """What training charges for equals what the model card measures, and it can be lowered."""
    trainer = start("one", max_tokens=128)
    model = trainer.model
    tokens = torch.from_numpy(trainer.tasks.batch(STAGES[0].mix, 65, 2, [0]).tokens)
    tables = train.rotary_tables(64, 64, model.sizes.rope_theta)
    rows = torch.tensor([5, 17, 60])
    _, activity = model.losses_and_activity(tokens, *tables, rows)
    on_bos = [weights[:, :, rows, 0] for weights in attention_weights(model, tokens[:, :-1])]
    expected = 1 - torch.stack(on_bos[1:]).mean()
    torch.testing.assert_close(activity, expected)
    activity.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    assert model.losses_and_activity(tokens, *tables, rows)[1] < activity


def test_attention_is_free_at_first_and_costs_in_full_later():
    """The cost rises in a straight line, and stays."""
    assert [schedule.cost_scale(progress) for progress in (0.0, 0.04, 0.08, 1.0)] == [0, 0.5, 1, 1]


def test_orthogonalised_matrices_have_singular_values_near_one():
    """Five coarse steps in bfloat16 bring wide and badly scaled matrices near orthogonality."""
    matrices = torch.randn(3, 64, 160) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    singular = torch.linalg.svdvals(orthogonalise(matrices))
    assert singular.min() > 0.5
    assert singular.max() < 1.5
