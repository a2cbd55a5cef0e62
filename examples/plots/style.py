"""What all pictures share: colours, sizes, small files.

A picture is looked at in a README at half width, some 450 pixels: so few panels, large letters, and every colour
comes with a line style of its own.
"""

from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
LANDSCAPE = "cividis"  # the same to readers with and without colour vision


@contextmanager
def figure(path: Path, width: float = 9.0, height: float = 5.0, rows: int = 1, columns: int = 1, **kwargs):
    """Axes (rows, columns) of a figure in inches at 100 dots each, saved to ``path`` at the end."""
    letters = {"font.size": 17, "axes.titlesize": 17, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({**letters, "lines.linewidth": 2.5, "legend.frameon": False}):
        drawing, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **kwargs
        )
        yield drawing, axes
        save(drawing, path)
        plt.close(drawing)


def save(drawing: Figure, path: Path) -> None:
    """As a PNG of at most 256 colours, a third of the size and no difference to see."""
    memory = BytesIO()
    drawing.savefig(memory, dpi=100)
    shrink(memory, path)


def shrink(source: BytesIO | Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
