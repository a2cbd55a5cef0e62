"""Figures in the loggers: when, where, what they show, and what is said where they cannot be drawn."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, trainer
from torch import nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses
from newton_plugin_lightning import _figures as figures

pytest.importorskip("matplotlib")


def logger_like_wandb(pl: Any) -> Any:
    """What Lightning's WandbLogger has for pictures: ``log_image(key, images, step)``."""

    class Pictures(importlib.import_module(f"{pl.__name__}.loggers").CSVLogger):  # type: ignore[name-defined, misc]
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.images: list[tuple[str, list[Any], int | None]] = []

        def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
            self.images.append((key, images, step))

    return Pictures


def fit(pl: Any, newton: NewtonLosses, logger: Any, batches: int = 6, **options: Any) -> None:
    module = options.pop("module", None) or case_module(pl, Functional)
    trainer(pl, newton, logger=logger, log_every_n_steps=1, **options).fit(
        module, Batches(batches_of(Functional, batches))
    )


def last_step(structure: Any, samples: int = 24, curvature: Any = "fisher") -> Any:
    torch.manual_seed(0)
    hook = npl.LossHook(structure=structure, curvature=curvature)
    hook(nn.Linear(4, 3).double()(torch.randn(samples, 4).double()).exp().square().mean()).backward()
    return hook.last_steps[0]


def test_tensorboard_gets_one_every_n_steps(pl: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = importlib.import_module(f"{pl.__name__}.loggers").TensorBoardLogger(tmp_path)
    fit(pl, NewtonLosses(log_figures_every_n_steps=2), board)
    events = accumulator.EventAccumulator(board.log_dir).Reload()
    assert events.Tags()["images"] == ["newton/figures"]
    seen = events.Images("newton/figures")
    assert [image.step for image in seen] == [1, 3, 5]
    assert all(image.width > 500 for image in seen)


@pytest.mark.parametrize("log", [True, False])
def test_wandb_gets_pixels(pl: Any, tmp_path: Path, log: bool) -> None:
    logger = logger_like_wandb(pl)(tmp_path)
    fit(pl, NewtonLosses(log_figures_every_n_steps=3, log=log), logger)
    assert [(key, step) for key, _, step in logger.images] == [("newton/figures", 2), ("newton/figures", 5)]
    for _, (image,), _ in logger.images:
        assert image.ndim == 3
        assert image.shape[-1] == 3
        assert image.dtype == "uint8"
        assert image.std() > 0, "something is drawn"


def test_with_accumulation_once_for_each_optimizer_step(pl: Any, tmp_path: Path) -> None:
    logger = logger_like_wandb(pl)(tmp_path)
    fit(pl, NewtonLosses(log_figures_every_n_steps=1), logger, accumulate_grad_batches=3)
    assert [step for _, _, step in logger.images] == [0, 1]


def test_every_boundary_has_its_own(pl: Any, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        outputs = self.model(batch[0])
        return self.model.loss(outputs, batch[1]) + self.second(outputs.detach()).square().mean()

    logger, module = logger_like_wandb(pl)(tmp_path), case_module(pl, Functional, training_step=training_step)
    module.second = nn.Linear(3, 2).double()
    newton = NewtonLosses(log_figures_every_n_steps=2)
    fit(pl, newton, logger, 2, module=module)
    names = [f"newton/figures/{found.name}" for found in newton.hook.boundaries]
    assert len(names) == 2
    assert [key for key, _, _ in logger.images] == names


def test_a_logger_without_pictures_is_named_once(pl: Any, tmp_path: Path) -> None:
    table = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger(tmp_path)
    pictures = logger_like_wandb(pl)(tmp_path / "pictures")
    with pytest.warns(UserWarning, match="CSVLogger takes no figures. They go to TensorBoardLogger and Wandb") as said:
        fit(pl, NewtonLosses(log_figures_every_n_steps=2), [table, pictures])
    assert sum("takes no figures" in str(w.message) for w in said) == 1
    assert len(pictures.images) == 3


def test_no_logger_is_said(pl: Any) -> None:
    with pytest.warns(UserWarning, match="log_figures_every_n_steps: the Trainer has no logger"):
        fit(pl, NewtonLosses(log_figures_every_n_steps=2), False)


def test_without_matplotlib_it_is_said_and_training_goes_on(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    logger = logger_like_wandb(pl)(tmp_path)
    with pytest.warns(UserWarning, match="matplotlib, which is not installed: pip install matplotlib"):
        fit(pl, NewtonLosses(log_figures_every_n_steps=2), logger)
    assert logger.images == []


def test_nobody_asks_for_figures_by_default(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_figure", lambda *args: pytest.fail("not asked"))
    logger = logger_like_wandb(pl)(tmp_path)
    fit(pl, NewtonLosses(), logger)
    assert logger.images == []


def test_one_number_is_a_line_across_the_batchs_own_eigenvalues() -> None:
    last = last_step("isotropic")
    left, right = figures._figure(last, 7).axes
    across, curve = left.get_lines()
    assert list(across.get_ydata()) == [pytest.approx(float(last.curvature))] * 2
    g = last.gradients
    expected = torch.linalg.eigvalsh(g.mT @ g / len(g)).flip(0)
    torch.testing.assert_close(torch.as_tensor(curve.get_ydata()), expected)
    sizes = torch.as_tensor(right.get_lines()[0].get_ydata())
    torch.testing.assert_close(sizes, g.norm(dim=1).sort(descending=True).values)
    assert f"tail {float(last.tail):.2f}" in right.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(("structure", "shape"), [("mean", (3, 3)), ("diagonal", (3,)), ("per_sample", (24, 3, 3))])
def test_eigenvalues_of_a_matrix_are_those_of_the_c_that_was_used(structure: str, shape: tuple[int, ...]) -> None:
    last = last_step(structure, curvature="hessian")
    assert last.curvature is not None
    assert last.curvature.shape == shape
    first = figures._figure(last, 0).axes[0].get_lines()[0]
    c = last.curvature.diag_embed() if structure == "diagonal" else last.curvature
    values = torch.linalg.eigvalsh(c).flatten().sort(descending=True).values
    torch.testing.assert_close(torch.as_tensor(first.get_ydata()), values[values > 1e-9 * values.max()])
    assert first.get_label().startswith("C, spread")


def test_what_is_not_known_is_said() -> None:
    torch.manual_seed(0)
    hook = npl.LossHook(curvature="norm")
    hook(nn.Linear(2, 3)(torch.randn(12, 2)).square().mean()).backward()
    left, right = figures._figure(hook.last_steps[0], 0).axes
    assert left.get_title() == "eigenvalues: not known here"
    assert right.get_title() == "sizes of gradients: not kept, or zero"
