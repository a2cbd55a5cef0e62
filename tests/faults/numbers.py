"""What is not finite, not invertible, not positive."""

from __future__ import annotations

import torch
from tests.faults.case import FISHER, HESSIAN, KEPT, LOOPS, NOTHING, Fault, Seen
from tests.faults.provocations import AWAKE, GOOD, LATER, bce, of_the_sum, spoiled, square, with_zero_outputs

import newton_plugin as npl

NUMBERS = (
    Fault(
        "NaN in the outputs",
        "a NaN among the inputs",
        KEPT,
        ("plain gradient", "later steps"),
        batches=(GOOD, spoiled(float("nan")), LATER),
    ),
    Fault(
        "infinity in the outputs",
        "an infinity among the inputs, squared error",
        KEPT,
        ("plain gradient", "later steps"),
        square,
        (GOOD, spoiled(float("inf")), LATER),
    ),
    Fault(
        "the loss is NaN or infinite, its gradient is not",
        "a NaN added to the loss",
        NOTHING,
        ("definition",),
        lambda y, t: bce(y, t) + float("nan"),
        options=FISHER,
    ),
    Fault(
        "the loss overflows, and so does its gradient",
        "exp(1000 + y)",
        KEPT,
        ("plain gradient", "later steps"),
        lambda y, t: torch.exp(y + (1000 if float(t.max()) > 1 else 0)).sum(-1).mean(),
        (GOOD, (LATER[0], LATER[1] + 1), LATER),
    ),
    Fault(
        "NaN or infinity in the gradient of a finite loss",
        "sqrt at 0",
        KEPT,
        ("plain gradient", "later steps"),
        lambda y, t: y.clamp_min(0).sqrt().sum(-1).mean(),
        (AWAKE, with_zero_outputs(), AWAKE),
    ),
    Fault(
        "NaN or infinity in the Hessian",
        "abs(y)^1.5 at 0, curvature='hessian'",
        KEPT,
        ("plain gradient", "later steps"),
        lambda y, t: y.abs().pow(1.5).sum(-1).mean(),
        (AWAKE, with_zero_outputs(), AWAKE),
        {"curvature": "hessian"},
    ),
    Fault(
        "the same, fixed damping",
        "abs(y)^1.5 at 0, curvature='hessian', damping=0.1",
        KEPT,
        ("plain gradient", "later steps"),
        lambda y, t: y.abs().pow(1.5).sum(-1).mean(),
        (AWAKE, with_zero_outputs(), AWAKE),
        HESSIAN,
    ),
    Fault(
        "singular C",
        "a loss of the sum of three features",
        NOTHING,
        ("definition",),
        of_the_sum,
        options=FISHER,
    ),
    Fault(
        "singular C, and a damping below rounding",
        "the same, damping=1e-300",
        KEPT,
        ("plain gradient",),
        of_the_sum,
        options={"damping": 1e-300},
    ),
    Fault(
        "NaN or infinity, on_nonfinite='raise'",
        "an infinity among the inputs, squared error",
        Seen(
            npl.NonFiniteError, "the gradient of the loss with respect to the outputs is not finite in 1 of 6 samples"
        ),
        ("no gradient",),
        square,
        (spoiled(float("inf")),),
        {"on_nonfinite": "raise"},
        doors=LOOPS,
    ),
    Fault(
        "singular C, on_nonfinite='raise'",
        "damping=1e-300",
        Seen(npl.SingularCurvatureError, "C + damping * I could not be inverted with damping 1e-300"),
        ("no gradient",),
        of_the_sum,
        options={"damping": 1e-300, "on_nonfinite": "raise"},
        doors=LOOPS,
    ),
    Fault(
        "C = 0: no gradient at all",
        "0 * loss",
        NOTHING,
        ("zero",),
        lambda y, t: 0 * square(y, t),
    ),
    Fault(
        "indefinite C",
        "sin(y), curvature='hessian'",
        NOTHING,
        ("definition", "descent"),
        lambda y, t: torch.sin(4 * y + t).sum(-1).mean(),
        options=HESSIAN,
    ),
)
