"""The example of eight networks trained at once: each is the network that a loop of its own trains."""

from __future__ import annotations

import pytest
import torch
from examples import ensemble
from examples.digit_lists import DigitLists
from torch import Tensor
from torch.func import functional_call

import newton_plugin as npl

STEPS, RATE = 4, 0.01


def trained_alone(k: int, with_newton: bool) -> dict[str, Tensor]:
    """Network k in an ordinary loop, with the hook in place of the pure function."""
    torch.manual_seed(0)
    network = [ensemble.scorer() for _ in range(ensemble.MEMBERS)][k]
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    hook = npl.LossHook()
    own = slice(k * ensemble.BATCH, (k + 1) * ensemble.BATCH)
    for images, ranks in DigitLists("train", ensemble.LENGTH, ensemble.MEMBERS * ensemble.BATCH, STEPS, seed=0):
        optimizer.zero_grad()
        loss = ensemble.ranking_loss(network(images[own]), ranks[own])
        (hook(loss) if with_newton else loss).backward()
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("with_newton", [False, True], ids=["plain", "newton"])
def test_each_network_is_that_of_a_loop_of_its_own(with_newton: bool) -> None:
    together = ensemble.train(with_newton, RATE, STEPS)
    images, _ = next(iter(DigitLists("test", ensemble.LENGTH, 20, 1, seed=1)))
    for k in (0, 3, ensemble.MEMBERS - 1):
        alone = trained_alone(k, with_newton)
        member = {name: p[k].detach() for name, p in together.items()}
        got, expected = (functional_call(ensemble.network, p, (images,)) for p in (member, alone))
        got, expected = got - got.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
        assert torch.allclose(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max())), k


def test_newton_is_not_plain() -> None:
    plain, newton = (ensemble.train(w, RATE, STEPS)["0.weight"] for w in (False, True))
    assert (plain - newton).abs().max() > 1e-3


def test_shares_are_counted_list_by_list() -> None:
    parameters = ensemble.train(True, RATE, STEPS)
    single, means = ensemble.evaluate(parameters, "test")
    images, ranks = next(iter(DigitLists("test", ensemble.LENGTH, 2000, 1, seed=1)))
    scores = torch.stack(
        [functional_call(ensemble.network, {n: p[k] for n, p in parameters.items()}, (images,)) for k in range(8)]
    ).detach()

    def share(ranked_by: Tensor) -> float:
        def order(values: list[float]) -> list[int]:
            return sorted(range(10), key=values.__getitem__)

        right = [order(a) == order(b) for a, b in zip(ranked_by.tolist(), ranks.tolist(), strict=True)]
        return 100 * sum(right) / len(right)

    assert single.tolist() == pytest.approx([share(s) for s in scores])
    assert means["scores"].item() == pytest.approx(share(scores.mean(0)))
    deviations = torch.stack([s / s.std() for s in scores])
    assert means["scores in units of their deviation"].item() == pytest.approx(share(deviations.mean(0)))


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(STEPS, [0.01, 0.03])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != " "] == ["plain", "newton"]
    assert len(lines) == 2 * 5
    assert all(0 <= float(line.split()[0]) <= 100 for line in lines if line[0] == " ")
