"""Every fault that the package promises to survive or to name.

One registry: ``test_faults.py`` asserts it through every door, ``table.py`` prints it as docs/faults.md.
"""

from __future__ import annotations

from tests.faults.boundaries import BOUNDARIES
from tests.faults.case import Fault
from tests.faults.losses import LOSSES_AND_OUTPUTS
from tests.faults.numbers import NUMBERS

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (*NUMBERS, *LOSSES_AND_OUTPUTS, *BOUNDARIES)
