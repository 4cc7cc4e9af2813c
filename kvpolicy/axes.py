"""Where the numbers of an axis and the labels of lines go, whatever draws them."""

import math
from collections.abc import Sequence


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, the outer ones at or beyond `low` and `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * x for x in (1, 2, 2.5, 5, 10) if rough <= power * x * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places between 0 and 1 apart until neighbours differ by a gap, or as far as fits."""
    gap = min(gap, 1 / max(len(places), 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    floor = gap / 2
    for index in order:
        found[index] = max(found[index], floor)
        floor = found[index] + gap
    ceiling = 1 - gap / 2
    for index in reversed(order):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - gap
    return found


def budget_marks(budgets: Sequence[float], most: int = 8) -> list[float]:
    """What a scale of budgets is marked with: the budgets themselves, if they are few."""
    places = sorted(set(budgets))
    return places if len(places) <= most else ratio_marks(places[0], places[-1])


def ratio_marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, the outer ones at or beyond the ends."""
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max((mark for mark in marks if mark <= low * 1.001), default=marks[0])
    last = min((mark for mark in marks if mark >= high / 1.001), default=marks[-1])
    return [mark for mark in marks if first <= mark <= last]
