"""Draws the pictures of docs/explanation/semantics.md: the occupancy law, and steps of real runs.

    .venv/bin/python docs/figures/draw_semantics.py

The law's curves are `Occupancy.held`. The steps are those of one KV head of the bundled model, as
`draw.py` runs it, at budgets so small that every slot can be seen.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from draw import look, record
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from kvpolicy import bundled_model, parse
from kvpolicy.page.canvas import on_paper, png, svg
from kvpolicy.page.themes import LIGHT

TOKENS, PROMPT = 64, 32
LAWS = {
    "prefill=stream, interval=1, as in the papers": "window:budget=16,interval=1",
    "prefill=stream, interval=8": "window:budget=16,interval=8",
    "prefill=bulk, interval=8: one eviction at the prompt's end": (
        "window:budget=16,interval=8,prefill=bulk"
    ),
    "protect=prompt, interval=8: the prompt stays, the law counts what follows": (
        "window:budget=16,interval=8,protect=prompt"
    ),
}
"""What a request with a prompt of `PROMPT` tokens holds."""

STEPS, SENTENCE = 18, 207
"""How many steps are drawn, and where in the held-out text a sentence begins, in tokens."""

SETS = (
    "window:budget=6,interval=3",
    "sinks:budget=6,interval=3,sinks=1",
    "h2o:budget=6,interval=3,recent=2",
)

GONE, SEEN, LEAVES = range(3)
"""States of a token at a step: gone before it, seen by its query, seen and evicted behind it."""


def main() -> None:
    """Draw both."""
    folder = Path(__file__).parent
    (folder / "law.svg").write_bytes(svg(LIGHT, law()))
    (folder / "steps.png").write_bytes(png(LIGHT, steps()))


def law() -> Figure:
    """Slots held after n tokens."""
    with on_paper(LIGHT):
        figure = Figure(figsize=(8, 7), layout="constrained")
        panels = figure.subplots(len(LAWS), sharex=True, sharey=True)
        n = np.arange(TOKENS + 1)
        for axes, (title, spec) in zip(panels, LAWS.items(), strict=True):
            held = parse(spec).occupancy.of_prompt(PROMPT).held
            axes.step(n, [held(int(x)) for x in n], where="post", color=LIGHT.colours[0])
            axes.axhline(16, color=LIGHT.plain, linestyle=":", linewidth=1)
            axes.axvspan(0, PROMPT, color=LIGHT.gone, zorder=0)
            axes.set_title(title, loc="left", fontsize=9)
            axes.set(xlim=(0, TOKENS), ylim=(0, 60), yticks=(0, 16, 32, 48))
            axes.spines[["top", "right"]].set_visible(False)
        figure.supylabel("slots held per KV head", fontsize=9)
        panels[-1].set_xlabel("tokens of the request; grey: its prompt; dotted: the budget, 16")
    return figure


def steps() -> Figure:
    """What each query of a text's beginning sees, and what leaves behind it."""
    with TemporaryDirectory() as scratch:
        trace = record(Path(scratch) / "passage.kvtrace", SENTENCE)
        states = {spec: states_of(look(trace, spec)[1]) for spec in SETS}
        ids = trace.read("tokens", None)[:STEPS].tolist()
    tokenizer = Tokenizer.from_file(str(Path(bundled_model()) / "tokenizer.json"))
    words = [tokenizer.id_to_token(ids[0]), *(tokenizer.decode([x]).strip() for x in ids[1:])]
    with on_paper(LIGHT):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for index, (spec, grid) in enumerate(states.items(), 1):
            draw_steps(figure.add_subplot(1, len(SETS), index), spec, grid, words)
    return figure


def states_of(held: np.ndarray) -> np.ndarray:
    """States of the first tokens at their first steps, from who is seen when; [T, T] each."""
    seen, later = held[:STEPS, :STEPS], held[1 : STEPS + 1, :STEPS]
    return np.where(seen, np.where(later, SEEN, LEAVES), GONE)


def draw_steps(axes: Axes, spec: str, states: np.ndarray, words: list[str]) -> None:
    """One policy's grid."""
    colours = ListedColormap([LIGHT.paper, LIGHT.most, LIGHT.colours[1]])
    axes.pcolormesh(states, cmap=colours, vmin=0, vmax=2, edgecolors=LIGHT.paper, linewidth=1.5)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    places = np.arange(STEPS) + 0.5
    axes.set_xticks(places, words, rotation=90, fontsize=7)
    axes.set_yticks(places, [f"n = {x + 1}" for x in range(STEPS)], fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(spec, fontsize=8.5, y=-0.07)


if __name__ == "__main__":
    main()
