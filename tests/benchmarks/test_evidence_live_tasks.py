"""What the live problems are: their data and parts, their losses, and what they are judged by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from benchmarks.evidence.live.pinn import Physics, _held_out
from benchmarks.evidence.live.regression import NoisyRegression, _function, _patients, student_t
from benchmarks.evidence.live.task import r_squared
from benchmarks.evidence.live.two_heads import TwoHeads, _images_and_ink
from benchmarks.evidence.live.vae import Autoencoder, _pixels
from torch import Tensor, nn


@pytest.mark.parametrize("parts_of", [_patients, _function, _images_and_ink, lambda part: (_pixels(part),)])
def test_no_sample_is_in_two_parts(parts_of: Any) -> None:
    rows = [torch.as_tensor(parts_of(part)[0]).flatten(1) for part in ("train", "validation", "test")]
    for k, a in enumerate(rows):
        for b in rows[k + 1 :]:
            assert float(torch.cdist(a, b).min()) > 1e-3


def test_points_of_the_equation_are_in_one_part() -> None:
    everything = torch.cat([Physics().training(0)[0], _held_out("validation"), _held_out("test")]).flatten()
    assert len(everything.unique()) == len(everything) == 64 + 400 + 400


def test_sizes_and_standardised_columns() -> None:
    for parts, sizes in [(_patients, (260, 80, 102)), (_function, (1000, 300, 1000)), (_pixels, (1000, 300, 497))]:
        for part, size in zip(("train", "validation", "test"), sizes, strict=True):
            found = parts(part)  # type: ignore[operator]
            assert len(found if isinstance(found, Tensor) else found[0]) == size
    for values in (*_patients("train"), _function("train")[1], _images_and_ink("train")[2]):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(0), torch.ones(values.shape[1]))


def test_noise_is_in_training_targets_and_changes_with_the_run() -> None:
    (x, y), (_, other) = NoisyRegression().training(3), NoisyRegression().training(4)
    clean = _function("train")
    assert torch.equal(x, clean[0])
    assert not torch.equal(y, other)
    torch.testing.assert_close(
        y - clean[1], NoisyRegression(1.0).training(3)[1].sub(clean[1]) / 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("x", [0.5, 1.0, 5.0, 20.0])
def test_student_t_with_two_degrees_of_freedom(x: float) -> None:
    """P(|t| < x) = x / sqrt(2 + x^2)."""
    drawn = student_t(200_000, torch.Generator().manual_seed(0))
    assert float((drawn.abs() < x).double().mean()) == pytest.approx(x / math.sqrt(2 + x * x), abs=4e-3)
    assert float((drawn > 0).double().mean()) == pytest.approx(0.5, abs=4e-3)


def test_r_squared_by_hand() -> None:
    targets = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert float(r_squared(targets, targets)) == 100
    assert float(r_squared(targets.mean(0).expand(2, 2), targets)) == 0
    assert float(r_squared(targets + torch.tensor([1.0, 0.0]), targets)) == pytest.approx(100 * (1 - 2 / (2 + 8)))


def test_ink_is_that_of_the_quadrants() -> None:
    images, _, ink = _images_and_ink("test")
    train = _images_and_ink("train")[0]
    for k, (rows, columns) in enumerate(
        [(r, c) for r in (slice(0, 4), slice(4, 8)) for c in (slice(0, 4), slice(4, 8))]
    ):
        sums, all_sums = images[:, rows, columns].sum((1, 2)), train[:, rows, columns].sum((1, 2))
        torch.testing.assert_close(ink[:, k], (sums - all_sums.mean()) / all_sums.std(), rtol=1e-4, atol=1e-5)


def test_two_heads_learned_weights_are_those_of_kendall() -> None:
    """exp(-s_k) l_k + s_k; both terms read off from losses with given weights."""
    torch.manual_seed(0)
    network: Any = TwoHeads(None).network()
    batch = tuple(values[:32] for values in _images_and_ink("train"))
    generator = torch.Generator()
    with torch.no_grad():
        digit, both = (TwoHeads(w).loss(network, batch, generator) for w in (0.0, 1.0))
        network.logarithms.copy_(torch.tensor([0.7, -0.4]))
    loss = TwoHeads(None).loss(network, batch, generator)
    terms = torch.stack([digit, both - digit])
    torch.testing.assert_close(loss, (terms * torch.tensor([math.exp(-0.7), math.exp(0.4)])).sum() + 0.3)
    loss.backward()
    torch.testing.assert_close(network.logarithms.grad, 1 - terms * torch.tensor([math.exp(-0.7), math.exp(0.4)]))


def test_two_heads_score_counts_both() -> None:
    _, labels, ink = _images_and_ink("test")
    right = nn.functional.one_hot(labels, 10).float()
    for logits, measured, wanted in [
        (right, ink, 100.0),
        (right, ink.mean(0).expand_as(ink), 50.0),
        (right, -ink, 50.0),  # a head that is worse than its mean takes nothing from the other
        (right.roll(1, -1), ink, 50.0),
    ]:
        found = TwoHeads(1.0).score(lambda _, pair=(logits, measured): pair, "test")  # type: ignore[arg-type]
        assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_the_negative_elbo_by_distributions() -> None:
    torch.manual_seed(0)
    network: Any = Autoencoder().network()
    (x,) = Autoencoder().training(0)
    loss = Autoencoder().loss(network, (x[:16],), torch.Generator().manual_seed(5))
    noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    hidden = network.encoder(x[:16])
    posterior = torch.distributions.Normal(network.mean(hidden), (network.log_variance(hidden) / 2).exp())
    logits = network.decoder(posterior.mean + posterior.stddev * noise)
    likelihood = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x[:16]).sum(-1)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(loss, (divergence - likelihood).mean())
    with torch.no_grad():
        assert float(Autoencoder().score(network, "validation")) == float(Autoencoder().score(network, "validation"))


def test_the_solution_of_the_equation_has_no_loss_and_all_points() -> None:
    class Solution(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.factor * torch.sin(math.pi * x)

        factor = 1.0

    solution = Solution()
    assert float(Physics().loss(solution, Physics().training(0), torch.Generator()).detach()) < 1e-9
    assert float(Physics().score(solution, "test")) == pytest.approx(100, abs=1e-4)
    solution.factor = 0.75
    assert float(Physics().score(solution, "validation")) == pytest.approx(75, abs=1e-4)
