"""The names that every door takes are those of the settings."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

import newton_plugin as npl
import newton_plugin_lightning
import newton_plugin_transformers
from newton_plugin._step.settings import CurvatureName, Reduction, StructureChoice

DOORS = [
    npl.newton_loss,
    npl.NewtonLoss,
    npl.LossHook,
    npl.newton_step,
    newton_plugin_lightning.NewtonLosses,
    newton_plugin_transformers.NewtonTrainerLoss,
]


def strings(annotation: Any) -> set[str]:
    """The strings among the literals of an annotation, however they are nested."""
    if isinstance(annotation, str):
        return {annotation}
    return {text for part in get_args(annotation) for text in strings(part)}


@pytest.mark.parametrize("door", DOORS, ids=lambda door: f"{door.__module__}.{door.__name__}")
def test_every_door_names_every_choice(door: Any) -> None:
    """The command line reads these annotations, and so do editors: a name that is missing there cannot be used."""
    parameters = inspect.signature(door, eval_str=True).parameters
    assert strings(parameters["curvature"].annotation) == strings(CurvatureName)
    if "reduction" in parameters:
        assert strings(parameters["reduction"].annotation) == strings(Reduction)
    # Tokens of a sentence have no block of their own: positions are not aligned between sentences.
    missing = {"block"} if door is newton_plugin_transformers.NewtonTrainerLoss else set()
    assert strings(parameters["structure"].annotation) == strings(StructureChoice) - missing
