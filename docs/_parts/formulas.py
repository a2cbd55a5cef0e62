"""Formulas as MathML, which browsers draw by themselves: no script, no font, nothing fetched from elsewhere."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def in_line(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="formula">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def displayed(translator: HTML5Translator, node: nodes.math_block) -> None:
    """One line, which scrolls where the window is narrower than the formula."""
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (in_line, None), (displayed, None))
    return {"parallel_read_safe": True}
