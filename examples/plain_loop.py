"""Newton Losses in a training loop of one's own.

python -m examples.plain_loop
"""

import argparse

import torch

import newton_plugin as npl
from examples.digit_scorer import batches, ranking_loss, report, scorer


def main(steps: int) -> None:
    model = scorer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hook = npl.LossHook()

    for step, (images, ranks) in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = hook(ranking_loss(model(images), ranks))  # the one line: the same tensor, the same value
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            numbers = hook.diagnostics()
            print(f"step {step}: loss {loss.item():.3f}, step norm {numbers['step_norm']:.3f}")
    report(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
