"""A variational autoencoder: the KL term reaches the encoder beside the decoder's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.terms import VAE
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["Autoencoder"]

LATENT, DRAWS = 8, 10


@dataclass(frozen=True)
class Autoencoder:
    """scikit-learn's digits, Bernoulli pixels, the network of ``benchmarks.terms``; summed over an image's pixels.

    The score is 100 less the negative ELBO in nats an image, at least 0: larger is better, and a point is a nat. It is
    a mean over ten draws of the latent variable, the same for all runs.
    """

    def network(self) -> nn.Module:
        return VAE()

    def training(self, seed: int) -> tuple[Tensor, ...]:
        return (_pixels("train"),)

    def loss(self, network: VAE, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        (x,) = batch
        return _negative_elbo(network, x, torch.randn(len(x), LATENT, generator=generator))

    def score(self, network: VAE, part: Part) -> Tensor:
        x = _pixels(part).repeat(DRAWS, 1)
        noise = torch.randn(len(x), LATENT, generator=torch.Generator().manual_seed(0))
        return 100 - _negative_elbo(network, x, noise)


def _negative_elbo(network: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction error plus KL divergence, mean over the images: (K, 64), (K, LATENT) -> one number of nats."""
    hidden = network.encoder(x)
    mean, logarithm = network.mean(hidden), network.log_variance(hidden)
    logits = network.decoder(mean + (logarithm / 2).exp() * noise)
    reconstruction = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    divergence = (mean.square() + logarithm.exp() - 1 - logarithm).sum(-1) / 2
    return (reconstruction + divergence).mean()


@cache
def _pixels(part: Part) -> Tensor:
    """(K, 64) from 0 to 1; the split of ``data.images``: shuffled by seed 0, 1,000 / 300 / 497."""
    pixels = torch.as_tensor(load_digits(return_X_y=True)[0]).float() / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    chosen = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}[part]
    return pixels[order[chosen]]
