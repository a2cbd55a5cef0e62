"""Newton Losses with Hugging Face Accelerate: the hook before ``accelerator.backward``.

python -m examples.accelerate_loop
"""

import argparse

import torch
from accelerate import Accelerator

import newton_plugin as npl
from examples.digit_scorer import batches, ranking_loss, report, scorer


def main(steps: int) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)  # cpu=False for a GPU
    model = scorer()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    hook = npl.LossHook()

    for images, ranks in batches(steps):
        with accelerator.accumulate(model):
            loss = hook(ranking_loss(model(images), ranks))  # the one line
            accelerator.backward(loss)  # divides it by gradient_accumulation_steps
            optimizer.step()
            optimizer.zero_grad()
    report(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
