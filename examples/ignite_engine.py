"""Newton Losses in PyTorch-Ignite: a wrapped loss as ``loss_fn``.

python -m examples.ignite_engine
"""

import argparse

import torch
from ignite.engine import Engine, Events, create_supervised_trainer

import newton_plugin as npl
from examples.digit_scorer import batches, ranking_loss, report, scorer


def main(steps: int) -> None:
    model = scorer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_fn = npl.newton_loss(ranking_loss)  # the one line

    trainer = create_supervised_trainer(model, optimizer, loss_fn)

    @trainer.on(Events.ITERATION_STARTED(every=50))
    def show(engine: Engine) -> None:
        numbers = loss_fn.diagnostics()
        if numbers:
            print(f"iteration {engine.state.iteration}: step norm {numbers['step_norm']:.3f}")

    trainer.run(batches(steps), max_epochs=1)
    report(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
