"""The eigenvalues of C while a network learns to rank digits, in plain training and with the plugin's steps.

Of 1,000 lists, not of the batch: a batch of 32 has eigenvalues that lie orders of magnitude apart by chance alone.
"""

from pathlib import Path

import torch
from matplotlib import colormaps
from torch import Tensor

import newton_plugin as npl
from examples.digit_lists import DigitLists
from examples.plots.style import RED, figure
from examples.rank_digits import DigitRankingData, RankDigits

STEPS, EVERY = 400, 10


def trained(newton: bool) -> tuple[list[int], Tensor, list[float]]:
    """Steps; the eigenvalues (times, 10) of C over 1,000 lists then, in ascending order; the damping that was used."""
    torch.manual_seed(0)
    model, data = RankDigits("neural_sort", steps=STEPS), DigitRankingData(10, steps=STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hook = npl.LossHook(structure="mean")
    many = next(iter(DigitLists("train", 10, batch_size=1000, batches=1, seed=9)))
    steps, eigenvalues, damping = [], [], []
    for step, (images, ranks) in enumerate(data.train_dataloader()):
        if step % EVERY == 0:
            scores = model(many[0]).detach().double()
            steps.append(step)
            c = npl.newton_step(model.stable_loss, scores, many[1], structure="mean").curvature
            eigenvalues.append(torch.linalg.eigvalsh(c))
        optimizer.zero_grad()
        loss = model.stable_loss(model(images), ranks)
        (hook(loss) if newton else loss).backward()
        optimizer.step()
        if newton and step % EVERY == 0:
            damping.append(float(hook.diagnostics()["damping"]))
    return steps, torch.stack(eigenvalues), damping


def draw(path: Path) -> str:
    """Returns how far the eigenvalues lie apart."""
    report = []
    with figure(path, 9, 5.2, columns=2, sharey=True) as (_, axes):
        for axis, newton in zip(axes[0], (False, True), strict=True):
            steps, eigenvalues, damping = trained(newton)
            eigenvalues = eigenvalues[:, 1:]  # the smallest is 0: the loss sees differences of scores only
            for k, curve in enumerate(eigenvalues.T):
                axis.semilogy(steps, curve, color=colormaps["cividis"](k / 8), lw=2)
            title = 'structure "mean"' if newton else "plain training"
            spread, late = eigenvalues[:, -1] / eigenvalues[:, 0], len(steps) // 2
            report.append(f"{title}: largest / smallest {spread[0]:.1f} at first, {spread[late:].median():.1f} late")
            if newton:
                axis.semilogy(steps, damping, "--", color=RED, lw=3.5, label="damping")
                axis.legend(loc="upper right")
            axis.set(title=title, xlabel="training step")
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel("eigenvalues 2 to 10 of C")
    return "; ".join(report)
