"""Every fault that the package promises to survive or to name.

One registry: ``test_faults.py`` asserts it through every door, ``faults_table.py`` prints it as docs/faults.md.
"""

from __future__ import annotations

from tests.core.fault import Fault
from tests.core.faults_of_boundaries import BOUNDARIES
from tests.core.faults_of_losses import LOSSES_AND_OUTPUTS
from tests.core.faults_of_numbers import NUMBERS

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (*NUMBERS, *LOSSES_AND_OUTPUTS, *BOUNDARIES)
