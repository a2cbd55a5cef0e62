"""What the pages get when the site is built: titles for tables, and whatever a list has left out.

"What is measured" shows the files that the benchmarks wrote, so a table cannot be forgotten and needs no copy.
"""

import re
from inspect import isclass, ismodule
from pathlib import Path
from types import ModuleType

_RESULTS = "<!-- results that this page does not name -->"
_PAGES = "<!-- pages that this list does not name -->"
# The sidebar has one entry for all tables, which opens.
_TABLES = "\n```{toctree}\n:hidden:\n:glob:\n\n../benchmarks/*\n../benchmarks/results/*\n```\n"


def with_title(page: str, text: str) -> str:
    """A page of results is what a script wrote; it gets a title where the script wrote none.

    >>> with_title("benchmarks/results/ranks", "Some text")
    '# Measured: ranks\\n\\nSome text'
    >>> with_title("benchmarks/results/ranks", "# Ranks")
    '# Ranks'
    """
    if not page.startswith("benchmarks/results/") or text.startswith("# "):
        return text
    return f"# Measured: {Path(page).name.replace('_', ' ')}\n\n{text}"


def with_unnamed(page: str, text: str, root: Path) -> str:
    """docs/measured.md with links to the tables, docs/index.md with the pages, that their authors have not named."""
    if page == "docs/measured":
        text += _TABLES
        names = [file.stem for file in sorted((root / "benchmarks" / "results").glob("*.md"))]
        links = {name: f"../benchmarks/results/{name}.md" for name in names}
        lines = [f"* [{name.replace('_', ' ')}]({link})" for name, link in links.items() if link not in text]
        return text.replace(_RESULTS, "\n".join(lines))
    if page == "docs/index":
        listed = set(text.splitlines())
        names = [file.stem for file in sorted((root / "docs").glob("*.md")) if file.stem != "index"]
        unnamed = [name for name in names if name not in listed]
        block = ["```{toctree}", ":caption: More", ":maxdepth: 1", "", *unnamed, "```"]
        return text.replace(_PAGES, "\n".join(block) if unnamed else "")
    return text


def with_unnamed_objects(text: str, package: ModuleType) -> str:
    """A page of the reference is in sections; a public name that is in none of them comes after the last.

    >>> import newton_plugin
    >>> page = with_unnamed_objects("```{eval-rst}\\n.. autofunction:: newton_plugin.newton_loss\\n```", newton_plugin)
    >>> page.count("newton_plugin.newton_loss\\n"), page.count(".. autoclass:: newton_plugin.LossHook\\n")
    (1, 1)
    """
    named = set(re.findall(rf"^\.\. auto\w+:: {re.escape(package.__name__)}\.(\w+)$", text, re.MULTILINE))
    objects = {name: getattr(package, name) for name in package.__all__ if name not in named}
    lines = [
        f".. {_directive(thing)}:: {package.__name__}.{name}" for name, thing in objects.items() if not ismodule(thing)
    ]
    title = f"Further names of {package.__name__}"  # one of a kind: titles are labels
    more = "\n".join(["", title, "-" * len(title), "", *lines, "```"]) if lines else "```"
    return text.rstrip().removesuffix("```") + more + "\n"


def _directive(thing: object) -> str:
    if not isclass(thing):
        return "autofunction"
    return "autoexception" if issubclass(thing, BaseException) else "autoclass"
