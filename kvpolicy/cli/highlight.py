"""Showing which tokens of a prompt a policy kept: colours on a terminal, brackets elsewhere."""

from collections.abc import Sequence

from rich.text import Text

from kvpolicy.passage import Passage, kept_runs

STYLES = {"most": "bold green", "some": "yellow", "none": "bright_black"}


def highlight(passage: Passage, shares: Sequence[float], *, is_terminal: bool) -> Text:
    """The passage with its kept tokens marked.

    Args:
        passage: The prompt.
        shares: For each token, the share of (layer, KV head) pairs that hold it.
        is_terminal: Colour the tokens; otherwise put those kept by at least half in brackets.
    """
    shown = Text()
    for kept, text in kept_runs(passage, shares):
        if is_terminal:
            shown.append(text, STYLES[kept])
        else:
            shown.append(f"[{text}]" if kept == "most" and text else text)
    return shown
