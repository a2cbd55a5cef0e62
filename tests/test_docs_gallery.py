"""The pictures of the documents: small files that their script makes anew, from rows that say what they show."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import gallery
from examples.plots import damping_sweep, gradients, landscape, training_curves
from examples.plots.style import shrink
from PIL import Image
from tests.reader import PAGES, ROOT

IMAGES = ROOT / "docs" / "img"


def test_every_picture_is_small_and_shown() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    for picture in IMAGES.iterdir():
        assert picture.stat().st_size < 100_000, picture.name
        assert f"img/{picture.name}" in shown, f"{picture.name} is on no page"
    assert {f"{name}.png" for name in gallery.PICTURES} <= {picture.name for picture in IMAGES.iterdir()}


def test_every_picture_is_described() -> None:
    """For readers who do not see it."""
    for page in PAGES:
        for tag in re.findall(r"<img [^>]*>", page.read_text()):
            assert re.search(r'alt="[^"]{20,}"', tag), f"{page.name}: {tag}"


def test_the_script_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    names = ["landscape", "training_curves", "damping_sweep"]
    try:
        files = gallery.main(["--only", *names, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    for file in files:
        with Image.open(file) as made, Image.open(IMAGES / file.name) as kept:
            assert made.size == kept.size, f"{file.name} is another picture: run python -m examples.gallery"
    assert "gradient: longest 3.9 times the median; Newton step: longest 1.3 times" in capsys.readouterr().out


@pytest.mark.slow
def test_the_two_that_take_longer(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        files = gallery.main(["--only", "gradients", "eigenvalues", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert all(file.stat().st_size < 100_000 for file in files)


def test_bands_are_students_intervals() -> None:
    mean, half = training_curves.band(np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert mean.item() == 3.0
    assert half.item() == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)  # t table, 4 degrees of freedom


def test_the_rows_are_those_of_the_tables() -> None:
    """The figures on docs/damping.md and in the picture are the same rows."""
    runs = [json.loads(line) for line in (training_curves.ROWS.parent / "auto_damping.jsonl").read_text().splitlines()]
    table = (training_curves.ROWS.parent / "auto_damping.md").read_text()
    for arm in ("plain", "Fisher auto", "Fisher 0.001"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {arm} | "))
        cells = dict(zip("ABCDEF", row.strip("| ").split(" | ")[1:], strict=True))
        for task in damping_sweep.TASKS:
            accuracies = damping_sweep.chosen(runs, task, arm)
            assert f"{accuracies.mean():.1f} ± {accuracies.std(ddof=1):.1f}" == cells[task]


def test_the_losses_that_are_drawn() -> None:
    y = torch.tensor([[-1.2, 1.2], [1.2, -1.2]], dtype=torch.float64)
    right, wrong = landscape.loss(y)
    assert right < 0.1 < 1 < wrong
    scores, ranks = gradients.lists(points=5, random=7)
    assert scores.shape == ranks.shape == (12, 5)
    assert (scores[2].argsort().argsort() == ranks[2]).all()  # the middle of the grey band is the right place


def test_shrinking_keeps_the_picture(tmp_path: Path) -> None:
    colors = np.zeros((40, 60, 3), dtype=np.uint8)
    colors[:, 30:] = (0, 114, 178)
    Image.fromarray(colors).save(tmp_path / "a.png")
    shrink(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as small:
        assert (np.asarray(small.convert("RGB")) == colors).all()
