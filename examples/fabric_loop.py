"""Newton Losses with Lightning Fabric: the hook before ``fabric.backward``.

python -m examples.fabric_loop
"""

import argparse

import torch

import newton_plugin as npl
from examples.digit_scorer import batches, ranking_loss, report, scorer

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:
    from lightning.fabric import Fabric


def main(steps: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")  # accelerator="auto" for a GPU
    model = scorer()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    hook = npl.LossHook()

    accumulate = 2
    for step, (images, ranks) in enumerate(batches(steps)):
        stepping = (step + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not stepping):
            loss = hook(ranking_loss(model(images), ranks))  # the one line
            fabric.backward(loss / accumulate)  # what scales the loss comes after it
        if stepping:
            optimizer.step()
            optimizer.zero_grad()
    report(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
