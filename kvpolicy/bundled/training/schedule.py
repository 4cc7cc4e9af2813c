"""What is trained when: lengths, mixes and learning rate as functions of progress in [0, 1].

Short sequences come first: they are faster, and what they teach carries over to longer ones.
"""

from dataclasses import dataclass

from kvpolicy.bundled.training.tasks import Mix

WARM_UP_STEPS = 150
DECAY_FROM = 0.50
FINAL_SCALE = 0.02


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Train at `length` tokens until `progress` reaches `until`."""

    until: float
    length: int
    mix: Mix


STAGES = (
    Stage(until=0.08, length=512, mix=Mix(books=0.44, facts=0.26, key_values=0.15, copies=0.15)),
    Stage(until=0.66, length=512, mix=Mix(books=0.62, facts=0.20, key_values=0.08, copies=0.10)),
    Stage(until=0.88, length=2048, mix=Mix(books=0.66, facts=0.18, key_values=0.08, copies=0.08)),
    Stage(until=1.00, length=4096, mix=Mix(books=0.66, facts=0.18, key_values=0.08, copies=0.08)),
)


def stage_index(progress: float) -> int:
    """Return which of `STAGES` is on at `progress`."""
    reached = [index for index, stage in enumerate(STAGES) if progress < stage.until]
    return reached[0] if reached else len(STAGES) - 1


def rate_scale(progress: float, step: int) -> float:
    """Return the factor of the learning rates: warm-up, plateau, straight line down."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = (1.0 - progress) / (1.0 - DECAY_FROM)
    return warm_up * max(FINAL_SCALE, min(1.0, decay))
