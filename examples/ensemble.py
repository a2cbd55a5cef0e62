"""Eight networks trained at once by ``torch.func.vmap``, with and without Newton Losses, and what their mean is worth.

Each scores images of handwritten digits and learns from the order of its own lists. The networks, their running states
and their batches are stacked: a step of all of them is one call.

    python -m examples.ensemble
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import newton_plugin as npl
from examples.digit_lists import DigitLists, Part
from newton_plugin.algorithms import RankingLoss

MEMBERS, LENGTH, BATCH = 8, 10, 32  # networks, images in a list, lists in a batch of one network

ranking_loss = RankingLoss("neural_sort", temperature=0.1)
newton = npl.functional.newton_loss(ranking_loss)


def scorer() -> nn.Module:
    """(B, n, 64) images -> (B, n) scores."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(-2))


network = scorer().to("meta")  # the form of all networks; their numbers are in dictionaries


def train(with_newton: bool, rate: float, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """The parameters of all networks, stacked, after ``steps`` of Adam with a cosine decay."""
    torch.manual_seed(seed)
    parameters, _ = stack_module_state([scorer() for _ in range(MEMBERS)])
    states = vmap(newton.init)(torch.zeros(MEMBERS, BATCH, LENGTH))
    optimizer = torch.optim.Adam(parameters.values(), rate)  # element by element: of each network by itself
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(parameters: dict[str, Tensor], state: npl.functional.NewtonState, images: Tensor, ranks: Tensor):
        scores = functional_call(network, parameters, (images,))
        return newton.apply(state, scores, ranks) if with_newton else (ranking_loss(scores, ranks), state)

    gradients_of = vmap(grad(loss, has_aux=True))
    for images, ranks in DigitLists("train", LENGTH, MEMBERS * BATCH, steps, seed):
        own = (images.unflatten(0, (MEMBERS, BATCH)), ranks.unflatten(0, (MEMBERS, BATCH)))
        gradients, states = gradients_of(parameters, states, *own)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()
        schedule.step()
    return parameters


def right(ranked_by: Tensor, ranks: Tensor) -> Tensor:
    """Percent of the lists whose order is fully right; (..., N, n) -> (...)."""
    return 100 * (ranked_by.argsort(-1).argsort(-1) == ranks).all(-1).double().mean(-1)


@torch.no_grad()
def evaluate(parameters: dict[str, Tensor], part: Part) -> tuple[Tensor, dict[str, Tensor]]:
    """What each network ranks right, (MEMBERS,), and what means of all of them do."""
    images, ranks = next(iter(DigitLists(part, LENGTH, batch_size=2000, batches=1, seed=1)))
    scores = vmap(lambda p: functional_call(network, p, (images,)))(parameters)
    unit = scores / scores.std((-2, -1), keepdim=True)  # a score has no unit: each network finds its own
    places = scores.argsort(-1).argsort(-1).double()
    means = {"scores": scores, "scores in units of their deviation": unit, "ranks": places}
    return right(scores, ranks), {name: right(values.mean(0), ranks) for name, values in means.items()}


def main(steps: int, rates: Sequence[float], seed: int = 0) -> None:
    for title, with_newton in (("plain", False), ("newton", True)):
        start = time.perf_counter()
        tried = {rate: train(with_newton, rate, steps, seed) for rate in rates}
        seconds = (time.perf_counter() - start) / len(rates)
        chosen = max(rates, key=lambda rate: evaluate(tried[rate], "validation")[0].mean().item())
        single, means = evaluate(tried[chosen], "test")
        print(f"{title}: {steps} steps of {MEMBERS} networks in {seconds:.1f} s, Adam at {chosen:g}")
        print(f"    {single.mean():.1f} %  one network (sd {single.std():.1f}, best {single.max():.1f})")
        for name, value in means.items():
            print(f"    {value:.1f} %  mean of {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01], help="of Adam; validation images choose one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # networks this small only wait for further threads
    main(given.steps, given.rates, given.seed)
