"""How Sphinx makes the site (`make docs`): the repository's Markdown as it is, and docstrings.

The source folder is the repository's root, so that links between pages, README.md and the other
files at the root mean the same on the site as in a clone. Pages carry no directives but those of
reference/api; the order of the site stands in toc.yml.
"""

import importlib
import sys
import warnings
from inspect import getdoc, isclass
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "reference"))

from api_pages import doors, public_names, stand_in_for_xformers  # noqa: E402

# It asks every object that Python knows for its class, torch's deprecated ones included.
warnings.filterwarnings("ignore", category=FutureWarning, module="sphinx_external_toc")

project = "kvpolicy"
author = "the kvpolicy authors"
project_copyright = f"{author}, Apache-2.0"
version = release = importlib.import_module("kvpolicy").__version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "kvpolicy/bundled/model/README.md"]
exclude_patterns = [".*", "tests", "docs/_build"]

extensions = [
    "myst_parser",
    "sphinx_external_toc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
external_toc_path = "docs/toc.yml"

# Headings get the anchors that GitHub gives them.
myst_heading_anchors = 4
# tests/docs/test_pages.py says which pages need no place in the order.
suppress_warnings = ["toc.not_included"]
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"

napoleon_numpy_docstring = False
napoleon_use_ivar = False
napoleon_attr_annotations = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
add_module_names = False
# Docstrings write `name` for code, as Markdown does.
default_role = "code"

nitpicky = True
INSIDE = r"kvpolicy(_hf|_sim|_vllm|_xformers)?\.[a-z_.]+\.[A-Za-z_]+"
# Other projects' names: their inventories are on the network, and the site is built without one.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(abc|collections|numpy|np|os|pathlib|random|torch|transformers|typing|vllm|xformers)\..*",
    ),
    (
        r"py:.*",
        r"(Any|ArrayLike|Path|Tensor|LLM|Iterable|Iterator|Mapping|Sequence|SearchStrategy)",
    ),
    # Ours, behind the doors.
    (r"py:.*", INSIDE),
]

html_theme = "furo"
html_title = "kvpolicy"
html_static_path = ["site/static"]
templates_path = ["site/templates"]
html_css_files = ["kvpolicy.css"]
html_additional_pages = {"index": "to-docs.html"}
html_copy_source = False
html_show_sphinx = False
# What commands print is as easy to read as what is typed.
pygments_style = "a11y-light"
pygments_dark_style = "a11y-high-contrast-dark"


def doors_of_objects() -> dict[str, str]:
    """Full name of each public object where it is defined, and where users import it from."""
    stand_in_for_xformers()
    shown = {}
    for door in doors():
        module = importlib.import_module(door.module)
        for name in public_names(door):
            found = getattr(module, name)
            if isclass(found):
                defined = f"{found.__module__}.{found.__qualname__}"
                shown.setdefault(defined, f"{door.module}.{name}")
    return shown


def link_to_the_door(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Resolve a type in a signature, which is named where it is defined, to where it is shown."""
    target = DEFINED.get(node.get("reftarget", ""))
    if target is None or node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def hide_colons(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: Any
) -> None:
    """Keep napoleon from taking what stands before a property's first colon for its type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(":", HIDDEN_COLON)


def show_colons(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: Any
) -> None:
    """Undo it, once napoleon is done."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def skip_numbered_fields(
    app: Sphinx, what: str, name: str, found: object, skip: bool, options: object
) -> bool | None:
    """Leave fields of named tuples to the docstring of their class."""
    return True if (getdoc(found) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's hook."""
    app.add_lexer("promql", TextLexer)  # Pygments' own stops at names such as vllm:requests
    app.connect("missing-reference", link_to_the_door)
    app.connect("autodoc-skip-member", skip_numbered_fields)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", show_colons, priority=600)
    return {"parallel_read_safe": True}


HIDDEN_COLON = "\N{RATIO}"
DEFINED = doors_of_objects()
