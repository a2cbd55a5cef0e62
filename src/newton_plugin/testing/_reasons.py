"""Torch's errors about losses that it cannot differentiate, in plain words, with a remedy."""

from __future__ import annotations

import re

__all__ = ["first_line", "in_plain_words"]

_FISHER = "or use curvature='fisher'"

# Pattern, words, remedy. The first pattern that matches the message decides; {0} is what its group matched.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"would mutate a captured Tensor",
        "it changes, in place, a tensor that it holds itself, such as a BatchNorm's running statistics",
        "hold no such tensor (track_running_stats=False), or change it outside the loss",
    ),
    (
        r"in-place operation|vmap: inplace|inplace operation|ZeroTensors are immutable",
        "it works in place on a tensor that is being differentiated",
        "write it out of place: x = x * 2, torch.stack in place of filling a buffer",
    ),
    (
        r"calling \.item\(\)|data-dependent control flow|\.item\(\) on a Tensor",
        "it takes a number out of a tensor: .item(), float(), or an if on its value",
        "keep numbers as tensors, and write torch.where in place of the if",
    ),
    (
        r"called random operation",
        "it draws random numbers, which vmap refuses to do for several samples at once",
        "draw them before the loss and pass them in, or call vmap with randomness='different'",
    ),
    (
        r"must override the setup_context",
        "it holds an autograd.Function whose forward takes ctx",
        "split that forward into forward and setup_context, and set generate_vmap_rule = True",
    ),
    (
        r"vmap support|vmap staticmethod|generate_vmap_rule",
        "it holds an autograd.Function without a rule for vmap",
        "set generate_vmap_rule = True on it, or give it a vmap method",
    ),
    (
        r"implement the jvp function",
        "it holds an autograd.Function without forward-mode differentiation",
        "give it a jvp method, or differentiate in reverse mode twice: jacrev(jacrev(loss))",
    ),
    (
        r"forward AD with (\S+) that",
        "torch has no forward-mode derivative of {0}",
        "differentiate in reverse mode twice: jacrev(jacrev(loss))",
    ),
    (
        r"derivative for '?(?:aten::)?(\w+?)'? is not implemented",
        "torch has no derivative of {0}, so the loss cannot be differentiated twice",
        f"write that operation out in elementary ones, {_FISHER}",
    ),
    (
        r"once_differentiable",
        "it holds an autograd.Function whose backward is marked once_differentiable",
        f"write that backward in differentiable torch operations and remove the mark, {_FISHER}",
    ),
    (
        r"numpy\(\) on Tensor that requires grad|[Cc]annot access (?:data pointer|storage)|tensor\.numpy\(\)",
        "it leaves torch for numpy",
        "write that part in torch, or put it into an autograd.Function with a backward",
    ),
    (
        r"does not require grad and does not have a grad_fn",
        "its value does not depend on the outputs: they are detached, or leave torch",
        "let the outputs reach the loss through torch operations alone, without detach(), .item() or torch.tensor()",
    ),
    (
        r"(?:[Ee]xpected|same|mixed).*(?:scalar type|dtype|Double|Float)|(?:scalar type|dtype).*(?:expected|match)",
        "it holds tensors of a dtype of their own",
        "let them follow the outputs: weight.to(outputs)",
    ),
)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def in_plain_words(error: BaseException) -> tuple[str, str]:
    """The reason and a remedy. An unknown error is shown by its class and first line, shortened, without a remedy."""
    message = str(error)
    for pattern, words, remedy in _KNOWN:
        found = re.search(pattern, message)
        if found:
            return words.format(*found.groups()), remedy
    line = first_line(error)
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:157] + '...'}", ""
