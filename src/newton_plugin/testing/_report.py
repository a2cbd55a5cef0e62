"""The report that :func:`newton_plugin.testing.check_loss` returns."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from typing import Literal

from newton_plugin.testing._advice import Advice

__all__ = ["Finding", "LossReport", "Status", "skipped"]

Status = Literal["ok", "note", "fails", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: "ok"; "note", it works, and there is something to know; "fails"; "skipped", not looked at.
        verdict: in a word or two, for programs: "exact", "coupled", "indefinite", …
        words: a sentence with what was measured, for people.
        remedy: what to do about it; empty where there is nothing to do.
        cause: the first line of the exception behind a failure, in torch's words.
        number: what was measured: an error, an eigenvalue, a ratio.
    """

    status: Status
    verdict: str
    words: str = ""
    remedy: str = ""
    cause: str = ""
    number: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it works; there may be something to know."""
        return self.status in ("ok", "note")


def skipped(why: str) -> Finding:
    """The finding of a check that was not made."""
    return Finding("skipped", "not looked at", why)


_SAID = ("fails", "not looked at")  # verdicts that only repeat the status

_TITLES = {
    "outputs": "outputs",
    "evaluation": "the loss itself",
    "reduction": "mean or sum",
    "gradient": "gradient, autograd",
    "gradient_differences": "  by finite differences",
    "hessian": "Hessian, double backward",
    "hessian_differences": "  by finite differences",
    "func_gradient": "torch.func gradient",
    "func_hessian": "torch.func Hessian",
    "func_per_sample": "torch.func vmap",
    "precision": "float32 against float64",
    "coupling": "samples of the batch",
    "determinism": "twice the same",
    "definiteness": "definiteness",
    "cost": "cost of a Hessian",
    "ignored": "rows that count",
    "tail": "tail",
    "spread": "spread",
}


@dataclass(frozen=True)
class LossReport:
    """What works for a loss at the given outputs, and why the rest does not. ``print`` it.

    Attributes:
        name: of the loss.
        samples, features: N and m.
        outputs: "real", or "complex": then each is looked at as two real features, which is what training needs too.
        evaluation: the loss gives a finite number (or one for each sample) with a graph.
        reduction: "mean", "sum", "neither" or "one loss for each sample", by a batch twice over; a note where it is
            another one than was told.
        gradient: by ordinary backpropagation. "exact", "non-finite", "wrong" or "missing".
        gradient_differences: the gradient against central differences of the loss.
        hessian: by double backward, as the plugin takes it. "exact"; "zero", there is none to take; "missing", there
            is one, and autograd cannot give it; "wrong", autograd gives another; "non-finite".
        hessian_differences: the same against central differences of the gradient.
        func_gradient: ``torch.func.grad`` of the batch's loss.
        func_hessian: ``torch.func.hessian`` of the batch's loss, by reverse mode twice where forward mode fails.
        func_per_sample: ``torch.func.vmap`` over samples of each one's Hessian, and whether that is the batch's.
        precision: gradient and Hessian in float32 against those in float64, at the same outputs.
        coupling: "independent", or "coupled": a sample's gradient depends on other samples' outputs.
        determinism: "deterministic"; "random", the same from the same seed of torch; "unrepeatable".
        definiteness: of the samples' Hessians: "positive definite", "positive semidefinite", "indefinite" or
            "negative semidefinite".
        cost: time of loss, gradient and Hessian over that of loss and gradient.
        ignored: "all"; "some ignored", rows without a gradient wherever they move (``ignore_index``, a mask, padding);
            "some flat", rows without one at these outputs alone.
        tail: the share of ``sum_i |g_i|^2`` that a tenth of the samples holds.
        spread: the largest eigenvalue of ``mean g g'`` over the mean of those that are not zero.
        available: what can be used as ``curvature``: "fisher", "norm", "hessian"; empty without a gradient.
        without_hessian: why "hessian" is not among them; empty where it is.
        asked: what ``curvature="hessian"`` did with this loss: "hessian", "fisher" or "error"; None without a gradient.
        advice: what to take, and why: ``advice.take`` is "default", "gated", "plain" or "mend".
    """

    name: str
    samples: int
    features: int
    outputs: Finding
    evaluation: Finding
    reduction: Finding
    gradient: Finding
    gradient_differences: Finding
    hessian: Finding
    hessian_differences: Finding
    func_gradient: Finding
    func_hessian: Finding
    func_per_sample: Finding
    precision: Finding
    coupling: Finding
    determinism: Finding
    definiteness: Finding
    cost: Finding
    ignored: Finding
    tail: Finding
    spread: Finding
    available: tuple[str, ...]
    without_hessian: str
    asked: Literal["hessian", "fisher", "error"] | None
    advice: Advice

    @property
    def findings(self) -> dict[str, Finding]:
        """All findings by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Finding)}

    def __str__(self) -> str:
        lines = [f"{self.name} at outputs of {self.samples} samples with {self.features} features", ""]
        if self.advice.take == "mend":
            lines += [*textwrap.wrap(self.advice.headline, 110), ""]
        for name, finding in self.findings.items():
            words = ": ".join(w for w in (finding.verdict, finding.words) if w and w not in _SAID)
            lines += _wrapped(f"{_TITLES[name]:<26}{finding.status:<9}", words)
            if finding.remedy:
                lines += _wrapped(" " * 35, f"-> {finding.remedy}")
        return "\n".join([*lines, "", *textwrap.wrap(self._available(), 110), *textwrap.wrap(str(self.advice), 110)])

    def _available(self) -> str:
        if not self.available:
            return "Available: no curvature."
        first, *others = map(repr, self.available)
        words = f"Available: curvature={', '.join([first, *others])}."
        if self.without_hessian:
            words += f" Not 'hessian': {self.without_hessian}."
        if "hessian" not in self.available and self.asked == "hessian":
            words += " If it is asked for, it is taken all the same, and is wrong."
        return words


def _wrapped(title: str, words: str) -> list[str]:
    return textwrap.wrap(words, 110, initial_indent=title, subsequent_indent=" " * 35, break_long_words=False)
