"""The reports of ``check_loss``, without what was timed."""

from __future__ import annotations

import dataclasses

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.losses import CLASSES, LOSSES

from newton_plugin import testing

__all__ = ["cases"]


def cases() -> list[Case]:
    """Every loss, at outputs of two sizes and in two dtypes."""
    sizes = (((5, 3), None), ((2, 70), None), ((2, 3, 2), 1))
    found = [_case(loss, shape, dims, "float64") for loss in LOSSES for shape, dims in sizes[:2]]
    found += [_case(loss, sizes[2][0], sizes[2][1], "float64") for loss in ("cross_entropy", "mse", "piecewise")]
    return found + [_case(loss, (5, 3), None, "float32") for loss in ("cross_entropy", "indefinite", "ranking")]


def _case(loss: str, shape: tuple[int, ...], feature_dims: int | None, dtype: str) -> Case:
    def body(record: Record) -> None:
        y = torch.randn(shape, dtype=torch.float64).to(getattr(torch, dtype))
        if loss in CLASSES:
            target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        elif loss == "ranking":
            target = torch.rand(shape).argsort(-1)
        else:
            target = torch.rand(shape).to(y)
        with record.attempt("report"):
            report = testing.check_loss(
                LOSSES[loss], y, target, feature_dims=feature_dims, loss_kwargs={"reduction": "mean"}
            )
            found = {name: finding for name, finding in report.findings.items() if name != "cost"}
            for name, finding in found.items():
                record.put(name, [finding.status, finding.verdict, finding.cause, finding.remedy])
            record.put("chosen", [*report.available, report.without_hessian, report.asked, report.advice.take])
            untimed = dataclasses.replace(
                report.cost, status="skipped", verdict="", words="timed", remedy="", number=None
            )
            record.put("printed", str(dataclasses.replace(report, cost=untimed)))

    return Case("reports", f"check_loss, {loss}, {shape}, {dtype}", body)
