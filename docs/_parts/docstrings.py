"""Docstrings here are prose with ``literals``: a star is a star, unless it makes *emphasis* or **bold type**.

reStructuredText thinks otherwise (``|x|`` is a substitution, ``**kwargs`` begins bold text), and wants an empty line
before an example and before a list. A star at the beginning of a line is an item of a list. What is literal already
(examples, blocks after ``::``, mathematics) stays as it is.
"""

import re

_CODE = re.compile(r"(``.+?``|:\w+:`[^`]+`)")
_STRONG = re.compile(r"(?<![*\w])\*\*(?![\s*])([^*]+?)(?<!\s)\*\*(?![*\w])")
_EMPHASIS = re.compile(r"(?<![*\w])\*(?![\s*])([^*]+?)(?<!\s)\*(?![*\w])")
_ITEM = re.compile(r"(\s*\* )(?=\S)")
_NAMES_GO_ON = re.compile(r"\s+([\w*]+, )+[\w*]+,$")  # "upper_params, lower_params," and on the next line more of them
_LITERAL_BEGINS = re.compile(r"(::|\.\. (math|code-block)::.*)$")


def as_rest(lines: list[str]) -> list[str]:
    r"""The lines of a docstring, as reStructuredText that says the same.

    >>> as_rest(["For *all* |x|, see ``a * b``, with", "method, **kwargs: the rest, so:", "    >>> 2**2"])
    ['For *all* \\|x\\|, see ``a * b``, with', 'method, \\*\\*kwargs: the rest, so:', '', '    >>> 2**2']
    >>> as_rest(["Either", "* a * b, or", "* c"])
    ['Either', '', '* a \\* b, or', '* c']
    >>> as_rest(["**Ties**: x**2, **kwargs"])
    ['**Ties**: x\\*\\*2, \\*\\*kwargs']
    """
    result: list[str] = []
    literal = -1  # indentation of the line that a literal block belongs to; -1: none
    for line in _joined(lines):
        indent = len(line) - len(line.lstrip())
        example = line.lstrip().startswith((">>>", "..."))
        if literal >= 0 and (not line.strip() or indent > literal):
            result.append(line)
            continue
        literal = -1
        if example:
            if result and result[-1].strip() and not result[-1].lstrip().startswith((">>>", "...")) and _opens(result):
                result.append("")
            literal = indent - 1  # what it prints belongs to it
        elif _LITERAL_BEGINS.search(line):
            literal = indent
        elif _begins_list(result, line):
            result.append("")
        result.append(line if literal >= 0 else _escape(line))
    return result


def _begins_list(before: list[str], line: str) -> bool:
    """Whether a line is the first item of a list that stands right below a line of text.

    >>> _begins_list(["Either"], "* a"), _begins_list(["* a", "  goes on"], "* b"), _begins_list([""], "* a")
    (True, False, False)
    """
    if not _ITEM.match(line) or not before or not before[-1].strip():
        return False
    indent = len(line) - len(line.lstrip())
    for earlier in reversed(before):
        if not earlier.strip() or len(earlier) - len(earlier.lstrip()) < indent:
            return True
        if len(earlier) - len(earlier.lstrip()) == indent:
            return not _ITEM.match(earlier)
    return True


def _joined(lines: list[str]) -> list[str]:
    """A list of arguments' names that goes on in a second line, in one."""
    result: list[str] = []
    for line in lines:
        if result and _NAMES_GO_ON.match(result[-1]):
            result[-1] += " " + line.strip()
        else:
            result.append(line)
    return result


def _opens(lines: list[str]) -> bool:
    """Whether the last paragraph is prose and not an example."""
    for line in reversed(lines):
        if not line.strip():
            break
        if line.lstrip().startswith(">>>"):
            return False
    return True


def _escape(line: str) -> str:
    item = _ITEM.match(line)
    if item:
        return item[0] + _escape(line[item.end() :])
    parts = _CODE.split(line)
    return "".join(part if k % 2 else _escape_prose(part) for k, part in enumerate(parts))


def _escape_prose(text: str) -> str:
    text = _STRONG.sub("\0\0\\1\0\0", text)
    text = _EMPHASIS.sub("\0\\1\0", text)
    return text.replace("*", r"\*").replace("|", r"\|").replace("\0", "*")
