"""The documentation site, made by Sphinx from the repository as it is:

    python -m sphinx --fail-on-warning --keep-going -b html -c docs . build/site    (or: make docs)

Sphinx's source folder is the *repository*, not docs/: a link such as ../benchmarks/results/ranks.md then means the same
on a code host and on the site, and the measured tables are pages of the site without being copied. Nothing is fetched.
"""

import importlib
import sys
from pathlib import Path

from sphinx.application import Sphinx

import newton_plugin

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs" / "_parts")]
from docstrings import as_rest  # noqa: E402
from pages import with_title, with_unnamed, with_unnamed_objects  # noqa: E402
from questions import with_entries  # noqa: E402

QUESTIONS = (ROOT / "docs" / "questions.md").read_text()

project = "newton_plugin"
author = "The newton_plugin developers"
copyright = "The newton_plugin developers; Apache-2.0"
version = release = newton_plugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "formulas"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".*", "build", "dist", "src", "integrations", "tests", "examples", "docs/_parts"]
nitpicky = False  # docstrings name torch's types, and no inventory is fetched

myst_enable_extensions = ["html_image"]  # <img width=...>, which code hosts understand, too
myst_heading_anchors = 4  # the anchors of a code host
suppress_warnings = ["myst.header"]  # results may begin with a heading of the second level
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"newton_plugin {release}"
html_math_renderer = "mathml"  # of the extension "formulas"
html_static_path = ["_parts/static"]
html_css_files = ["site.css"]
html_extra_path = ["_parts/index.html"]  # the site's own first page, which leads to docs/index.html
html_show_sphinx = False
html_copy_source = False
# The palette of the pictures (Okabe and Ito).
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}


def change_page(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = with_unnamed(page, with_title(page, source[0]), ROOT)
    source[0] = with_entries(page, source[0], QUESTIONS)
    if page.startswith("docs/api/"):
        source[0] = with_unnamed_objects(source[0], importlib.import_module(Path(page).name))


def change_docstring(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    lines[:] = as_rest(lines)


def setup(app: Sphinx) -> None:
    app.connect("source-read", change_page)
    app.connect("autodoc-process-docstring", change_docstring, priority=400)  # before Napoleon (500)
