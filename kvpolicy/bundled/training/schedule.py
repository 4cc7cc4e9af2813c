"""What is trained when: lengths, mixes, rates and costs as functions of progress in [0, 1].

Short sequences come first: they are faster, and what they teach carries over to longer ones.
"""

from dataclasses import dataclass

from kvpolicy.bundled.training.tasks import Mix

WARM_UP_STEPS = 150
DECAY_FROM = 0.50
FINAL_SCALE = 0.02
FULL_COST_FROM = 0.08


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Train at `length` tokens until `progress` reaches `until`."""

    until: float
    length: int
    mix: Mix


STAGES = (
    Stage(until=0.08, length=512, mix=Mix(books=0.40, facts=0.24, key_values=0.22, copies=0.14)),
    Stage(until=0.60, length=512, mix=Mix(books=0.58, facts=0.18, key_values=0.16, copies=0.08)),
    Stage(until=0.88, length=2048, mix=Mix(books=0.62, facts=0.14, key_values=0.16, copies=0.08)),
    Stage(until=1.00, length=4096, mix=Mix(books=0.62, facts=0.14, key_values=0.16, copies=0.08)),
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


def cost_scale(progress: float) -> float:
    """Return the factor of the cost of attention: heads learn what is worth it before they pay."""
    return min(1.0, progress / FULL_COST_FROM)
