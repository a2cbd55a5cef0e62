"""Losses of several terms: does a step at the loss keep what one term counts against another?

    python -m benchmarks.terms [--seeds 3] [--out FILE]

Two problems that end badly where a plugin re-weighs terms. A VAE on scikit-learn's digits, whose KL term reaches the
encoder beside the decoder's outputs, in three reductions; the measure is -ELBO on test data, in nats an image. A
physics-informed network for u'' = -pi^2 sin(pi x) with u(0) = u(1) = 0, whose residual holds second derivatives of the
network; the measure is the mean squared error of u. Beside it the same network fits u itself: one term, the control.
Each arm trains with the same optimizer and learning rate as plain: constant, or falling to zero by a cosine.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import newton_plugin as npl

ARMS: dict[str, dict[str, Any] | None] = {"plain": None, "default": {}, "norm": {"curvature": "norm"}}
Hook = Callable[[Tensor], Tensor]


def hook_of(options: dict[str, Any] | None, **more: Any) -> Hook:
    """The loss hook of an arm; the identity for plain training."""
    return (lambda loss: loss) if options is None else npl.LossHook(**options, **more)


class VAE(nn.Module):
    """One hidden layer each way, 8 latent dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(128, 8), nn.Linear(128, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels, and mean and log-variance of the latent variable."""
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        return self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean)), mean, log_variance


def elbo_terms(model: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction error and KL divergence of each image, in nats."""
    logits, mean, log_variance = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    return reconstruction, (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums of an image, mean over images": lambda r, k: (r + k).mean(),
    "mean over pixels, KL / 64": lambda r, k: r.mean() / 64 + k.mean() / 64,
    "sum over everything": lambda r, k: r.sum() + k.sum(),
}


def train_vae(seed: int, reduction: str, options: dict[str, Any] | None) -> float:
    """-ELBO of the test images after 40 epochs, in nats an image."""
    torch.manual_seed(seed)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    images = images[torch.randperm(len(images))]
    train, test = images[:1400], images[1400:]
    model = VAE()
    summed = reduction.startswith("sum over")
    hook = hook_of(options, reduction="sum" if summed else "mean")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            hook(REDUCTIONS[reduction](*elbo_terms(model, batch))).backward()
            optimizer.step()
    with torch.no_grad():
        return statistics.fmean(float((r + k).mean()) for r, k in (elbo_terms(model, test) for _ in range(10)))


def fit_loss(net: nn.Module, x: Tensor) -> Tensor:
    """Mean squared error of the function itself: one term."""
    return (net(x) - torch.sin(math.pi * x)).square().mean()


def pinn_loss(net: nn.Module, x: Tensor) -> Tensor:
    """Mean squared residual of the equation, and of the values at both ends."""
    x = x.clone().requires_grad_()
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    residual = ddu + math.pi**2 * torch.sin(math.pi * x)
    return residual.square().mean() + net(torch.tensor([[0.0], [1.0]], dtype=x.dtype)).square().mean()


def train_pinn(
    seed: int, options: dict[str, Any] | None, loss_of: Callable[[nn.Module, Tensor], Tensor], name: str
) -> float:
    """Mean squared error of u on a grid, after 1,500 steps of Adam or 60 of LBFGS."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    hook = hook_of(options)
    x = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    if name == "LBFGS":
        optimizer: Any = torch.optim.LBFGS(net.parameters(), max_iter=20, line_search_fn="strong_wolfe")
        steps = 60
    else:
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        steps = 1500
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if name == "cosine" else None

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = hook(loss_of(net, x))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        if falling is not None:
            falling.step()
    grid = torch.linspace(0, 1, 500, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return float((net(grid) - torch.sin(math.pi * grid)).square().mean())


PROBLEMS: dict[str, Callable[[int, dict[str, Any] | None], float]] = {
    **{f"VAE, {name}": (lambda s, o, n=name: train_vae(s, n, o)) for name in REDUCTIONS},
    "fit, Adam, constant rate": lambda s, o: train_pinn(s, o, fit_loss, "constant"),
    "fit, Adam, cosine": lambda s, o: train_pinn(s, o, fit_loss, "cosine"),
    "PINN, Adam, constant rate": lambda s, o: train_pinn(s, o, pinn_loss, "constant"),
    "PINN, Adam, cosine": lambda s, o: train_pinn(s, o, pinn_loss, "cosine"),
    "PINN, LBFGS": lambda s, o: train_pinn(s, o, pinn_loss, "LBFGS"),
}


def main() -> None:
    """Train every arm on every problem and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = ["| problem | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    print("\n".join(lines), flush=True)
    for name, train in PROBLEMS.items():
        if given.only not in name:
            continue
        cells = []
        for options in ARMS.values():
            values = [train(seed, options) for seed in range(given.seeds)]
            cells.append(", ".join(f"{value:.4g}" for value in values))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
