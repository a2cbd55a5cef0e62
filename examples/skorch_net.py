"""Newton Losses in skorch: ``NewtonLoss`` as ``criterion``, its arguments searched by scikit-learn.

python -m examples.skorch_net
"""

import argparse
from typing import Any

import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

import newton_plugin as npl
from examples.digit_lists import digit_images


def network(epochs: int, **options: Any) -> NeuralNetClassifier:
    """A classifier of digits. ``criterion__...`` are the arguments of ``NewtonLoss``."""
    return NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        criterion=npl.NewtonLoss,
        criterion__loss_fn=nn.functional.cross_entropy,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=epochs,
        batch_size=64,
        predict_nonlinearity=nn.Softmax(-1),  # skorch knows this by itself for nn.CrossEntropyLoss alone
        train_split=None,
        verbose=0,
        **options,
    )


def main(epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = (t.numpy() for t in digit_images("train"))
    grid = {"criterion__damping": ["auto", 0.1], "criterion__structure": ["mean", "isotropic"]}
    search = GridSearchCV(network(epochs), grid, cv=2, scoring="accuracy").fit(images, labels)
    for arguments, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"{score:.1%} of held-out digits right with {arguments}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
