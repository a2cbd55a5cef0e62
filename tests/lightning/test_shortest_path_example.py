"""The terrain generator, the loader of the real maps, and the example that learns from paths."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from examples import terrain
from examples.path_picture import PathPicture
from examples.shortest_path import TerrainCosts
from examples.terrain_data import TerrainData
from examples.terrain_files import load_warcraft
from torch import Tensor

from newton_plugin.algorithms import shortest_path
from newton_plugin_lightning import NewtonLosses, cli

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl

LOSSES = get_args(inspect.signature(TerrainCosts).parameters["loss"].annotation)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def maps() -> terrain.Maps:
    return terrain.draw_maps(70, size=12, seed=5)


def test_maps_are_what_they_say(maps: terrain.Maps) -> None:
    images, costs, paths = maps
    assert images.shape == (70, 3, 96, 96)
    assert images.dtype == torch.uint8
    assert set(costs.unique().tolist()) == set(torch.tensor(terrain.COSTS).tolist())
    assert torch.equal(paths, shortest_path(costs.double()).path.float())
    again = terrain.draw_maps(70, size=12, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    assert not torch.equal(terrain.draw_maps(5, seed=6).costs, costs[:5])
    assert terrain.draw_maps(2, size=15).images.shape == (2, 3, 120, 120)


def test_paths_are_unique(maps: terrain.Maps) -> None:
    """Make any one tile of the path a little dearer: a tie would step in at the old cost, here nothing does."""
    for costs, path in zip(maps.costs[:10].double(), maps.paths[:10], strict=True):
        tiles = path.nonzero()
        dearer = costs.repeat(len(tiles), 1, 1)
        dearer[torch.arange(len(tiles)), tiles[:, 0], tiles[:, 1]] += 0.01
        found, base = shortest_path(dearer), shortest_path(costs)
        torch.testing.assert_close(found.distance, base.distance.expand(len(tiles)) + 0.01)
        assert (found.path == path).all()


def test_ties_are_noticed() -> None:
    costs = torch.ones(2, 3, 4)  # several ways of four tiles
    costs[1, 0] = torch.tensor([1.0, 9.0, 9.0, 9.0])
    costs[1, 1] = torch.tensor([9.0, 1.0, 1.0, 9.0])
    costs[1, 2] = torch.tensor([9.0, 9.0, 9.0, 1.0])
    assert terrain.is_only_path(costs, shortest_path(costs).path).tolist() == [False, True]


def test_shortcuts_fail_and_terrains_are_connected(maps: terrain.Maps) -> None:
    for path in terrain.shortcuts(maps.costs).values():
        assert not terrain.same_path(path, maps.paths).any()
    same = torch.zeros_like(maps.costs, dtype=torch.bool)
    down = maps.costs[:, 1:] == maps.costs[:, :-1]
    right = maps.costs[..., 1:] == maps.costs[..., :-1]
    same[:, 1:] |= down
    same[:, :-1] |= down
    same[..., 1:] |= right
    same[..., :-1] |= right
    assert same.double().mean() > 0.8  # white noise: 0.57


def test_loading_the_real_files(tmp_path: Path, maps: terrain.Maps) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*train_maps\.npy\. They are in .*https://doi\.org/10\.17617/3"):
        load_warcraft(tmp_path, "train")
    np.save(tmp_path / "train_maps.npy", maps.images.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "train_vertex_weights.npy", maps.costs.half().numpy())
    np.save(tmp_path / "train_shortest_paths.npy", maps.paths.to(torch.uint8).numpy())
    loaded = load_warcraft(tmp_path, "train", limit=10)
    assert torch.equal(loaded.images, maps.images[:10])
    assert torch.equal(loaded.paths, maps.paths[:10])
    torch.testing.assert_close(loaded.costs, maps.costs[:10], rtol=1e-3, atol=0)
    np.save(tmp_path / "train_maps.npy", maps.images.numpy())
    with pytest.raises(
        ValueError, match=r"must be \(N, 8h, 8w, 3\), \(N, h, w\) and \(N, h, w\); got \(70, 3, 96, 96\)"
    ):
        load_warcraft(tmp_path, "train")


def small(maps: terrain.Maps) -> TerrainData:
    data = TerrainData(batch_size=8)
    for part in ("train", "val", "test"):
        data.maps[part] = terrain.Maps(*(t[:16] for t in maps))
    return data


@pytest.mark.parametrize("newton", [None, {"curvature": "fisher"}], ids=["plain", "newton"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss: Any, newton: dict[str, Any] | None, maps: terrain.Maps) -> None:
    torch.manual_seed(0)
    model = TerrainCosts(loss, samples=4)
    before = [p.clone() for p in model.parameters()]
    callbacks = [] if newton is None else [NewtonLosses(**newton)]
    trainer = pl.Trainer(max_steps=2, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(model, small(maps))
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
    scores = trainer.test(model, small(maps), verbose=False)[0]
    assert 0 <= scores["test/perfect"] <= 1 <= scores["test/cost_ratio"] + 1e-6


def test_the_true_costs_are_a_solution_of_every_loss(maps: terrain.Maps) -> None:
    """Sharp relaxation, little noise: at the true costs all losses are near zero, at constant costs they are not."""
    costs, paths = maps.costs[:8], maps.paths[:8]
    for loss in LOSSES:
        model = TerrainCosts(loss, steepness=50.0, sigma=0.01)
        at_truth, at_constant = (model.path_loss(c, paths).item() for c in (costs, torch.ones_like(costs)))
        # Bellman-Ford marks the start's cheapest neighbour on top: up to one tile of 144.
        assert at_truth <= 1 / 144 + 1e-3, loss
        assert at_constant > 2 * at_truth + 1e-3, loss


def test_the_picture(tmp_path: Path, maps: terrain.Maps) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "sub" / "paths.png"
    trainer = pl.Trainer(max_steps=1, callbacks=[PathPicture(str(file), count=2)], **QUIET)
    trainer.fit(TerrainCosts("fenchel_young", samples=2), small(maps))
    assert file.stat().st_size > 10_000


def test_the_network_sees_one_tile_at_a_time(maps: terrain.Maps) -> None:
    torch.manual_seed(0)
    model = TerrainCosts()

    def cost(image: Tensor) -> Tensor:
        return model(image)[0, 3, 4]

    image = maps.images[:1].float().requires_grad_()
    (g,) = torch.autograd.grad(cost(image), image)
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[24:32, 32:40] = True
    assert g[..., inside].any()
    assert not g[..., ~inside].any()


def test_the_configuration_as_it_is(tmp_path: Path, maps: terrain.Maps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML file with two steps on a few maps, in a folder of its own: metrics, picture, the saved configuration."""
    config = Path(terrain.__file__).parent / "shortest_path.yaml"
    few = terrain.Maps(*(t[:32] for t in maps))
    monkeypatch.setattr("examples.terrain_data.draw_maps", lambda count, size, seed: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
    few_steps = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr("sys.argv", ["newton_plugin_lightning", "fit", "--config", str(config), *few_steps])
    assert cli.main() == 0
    assert (tmp_path / "lightning_logs" / "shortest_path.png").stat().st_size > 10_000
    (metrics,) = tmp_path.glob("lightning_logs/shortest_path/version_*/metrics.csv")
    assert {"val/perfect", "val/cost_ratio"} <= set(metrics.read_text().splitlines()[0].split(","))
