"""docs/explanation/gallery.md: a picture of every policy, of what it really holds."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from fixtures.documents import ROOT
from kvpolicy import parse
from kvpolicy.registry import BUILT_IN

GALLERY = ROOT / "docs" / "explanation" / "gallery.md"
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that draws."""
    spec = spec_from_file_location("draw", FIGURES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> dict[str, str]:
    """Specs of the gallery's columns, by the name of the picture below each."""
    found = {}
    rows = [line.strip("| ").split(" | ") for line in GALLERY.read_text("utf-8").splitlines()]
    for heads, pictures in zip(rows, rows[2:], strict=False):
        for head, picture in zip(heads, pictures, strict=False):
            if match := re.search(r"figures/([\w-]+)\.png\)", picture):
                found[match[1]] = head.strip("`")
    return found


def test_every_policy_has_its_picture(script: ModuleType) -> None:
    """All built-in policies are shown, each under the spec by which its picture is drawn."""
    specs = shown()
    assert {parse(spec).name for spec in specs.values()} == {*BUILT_IN}
    assert {name: script.POLICIES[name] for name in specs} == specs


@pytest.mark.parametrize("name", sorted(shown()))
def test_a_picture_holds_what_the_law_says(name: str, script: ModuleType) -> None:
    """Row by row, as many pixels are blue as tokens are visible: those held, and its own."""
    pixels = np.asarray(Image.open(FIGURES / f"{name}.png"))
    layers = script.LAYERS.get(name, (script.LAYER,))
    assert pixels.shape == (script.TOKENS, len(layers) * (script.TOKENS + script.GAP) - script.GAP)
    for index, layer in enumerate(layers):
        left = index * (script.TOKENS + script.GAP)
        blue = pixels[:, left : left + script.TOKENS] >= script.LEVELS
        law = parse(shown()[name]).of_layer(layer).occupancy.of_prompt(script.PROMPT)
        visible = [int(law.held(t)) + 1 for t in range(script.TOKENS)]
        assert blue.sum(axis=1).tolist() == visible
        assert not np.triu(blue, 1).any()
