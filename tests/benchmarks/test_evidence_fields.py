"""Fields of steps: the arrows are the gradients and steps of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.evidence.problems.ranking import METHODS
from benchmarks.evidence.tables.fields import RULES, field, write_fields


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_pushes_towards_the_right_order(method: str) -> None:
    points, taken = field(method, "gradient")
    wrong = (points[:, 0] > 0.5) & (points[:, 1] < -0.5)  # both are on the wrong side of the third
    assert (taken[wrong, 0] > 0).all()
    assert (taken[wrong, 1] < 0).all()


def test_the_default_has_the_gradients_directions_and_the_matrix_does_not() -> None:
    fields = {rule: field("neural_sort", rule)[1] for rule in RULES}
    for rule, same in (("default", True), ("soft normalisation", True), ("Fisher, matrix", False)):
        cosine = torch.nn.functional.cosine_similarity(fields[rule], fields["gradient"])
        assert bool((cosine > 1 - 1e-9).all()) is same, rule


def test_a_figure_and_a_table(tmp_path: Path) -> None:
    figure, table = write_fields(tmp_path / "e")
    assert figure.stat().st_size > 10_000
    assert all(title in table.read_text() for title, _ in METHODS.values())
