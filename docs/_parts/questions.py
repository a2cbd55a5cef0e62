"""What a reader types into the search box finds the page that answers it first.

docs/questions.md says it, in comments that nobody sees on the page:

    <!-- search DDP, FSDP: several-processes.md -->

Sphinx's search puts an entry of the index that is marked as a main one before everything else. So each word becomes
such an entry: at the page that is named, or, where none is named, at the question below which the comment stands.
"""

import re

_COMMENT = re.compile(r"^<!-- search (.+?)(?:: ([\w-]+)\.md)? -->$", re.MULTILINE)


def words(text: str) -> dict[str, list[str]]:
    """The words that docs/questions.md promises, by the page of docs/ that they lead to ("questions": itself).

    >>> words("## Several?\\n<!-- search DDP, FSDP: several-processes.md -->\\n<!-- search GPUs -->")
    {'several-processes': ['DDP', 'FSDP'], 'questions': ['GPUs']}
    """
    found: dict[str, list[str]] = {}
    for names, page in _COMMENT.findall(text):
        found.setdefault(page or "questions", []).extend(names.split(", "))
    return found


def with_entries(page: str, text: str, questions: str) -> str:
    """A page with its entries: other pages below their title, docs/questions.md at each question.

    >>> print(with_entries("docs/ddp", "# DDP\\n\\nText", "<!-- search DDP: ddp.md -->"))
    # DDP
    <BLANKLINE>
    ```{index} ! single: DDP
    ```
    <BLANKLINE>
    Text
    """
    if page == "docs/questions":
        return _COMMENT.sub(lambda m: m[0] if m[2] else _entries(m[1].split(", ")), text)
    named = words(questions).get(page.removeprefix("docs/"), [])
    if not named or not page.startswith("docs/"):
        return text
    title, _, rest = text.partition("\n\n")
    return f"{title}\n\n{_entries(named)}\n\n{rest}"


def _entries(names: list[str]) -> str:
    return "\n\n".join(f"```{{index}} ! single: {name}\n```" for name in names)
