"""Learn what every person costs in every job, from nothing but who was given which job.

Each example shows n people (images of n different handwritten digits) and the cheapest assignment of them to n jobs,
where a person's costs depend on the digit by a hidden table. The network sees images and has to find costs, one for
each job, under which scipy's linear_sum_assignment, a black box, makes the same assignments.

    python -m examples.assignment [--seeds 3] [--steps 300] [--samples 4]
"""

import argparse
from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import newton_plugin as npl
from examples.digit_lists import Part, digit_images
from newton_plugin.algorithms import FenchelYoungLoss, PerturbedOptimizer

JOBS = 5
ARMS = [  # loss, estimator, curvature of Newton Losses
    ("Fenchel-Young", "score", None),
    ("Fenchel-Young", "score", "hessian"),
    ("Fenchel-Young", "score", "fisher"),
    ("Fenchel-Young", "score", "norm"),
    ("Hamming", "score", None),
    ("Hamming", "symmetric_score", None),
    ("Hamming", "finite_difference", None),
    ("Hamming", "finite_difference", "norm"),
]


def assign(costs: Tensor) -> Tensor:
    """The cheapest assignments as permutation matrices: (B, n, n) -> (B, n, n). Leaves torch, and may."""
    solutions = torch.zeros_like(costs)
    for solution, matrix in zip(solutions.numpy(), costs.numpy(), strict=True):
        solution[linear_sum_assignment(matrix)] = 1
    return solutions


def batches(part: Part, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``count`` times images (size, n, 64), their true costs and the observed assignment (size, n, n)."""
    images, digits = digit_images(part)
    hidden = torch.rand(10, JOBS, generator=torch.Generator().manual_seed(0))  # the same for all seeds
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        people = torch.rand(size, 10, generator=generator).argsort(-1)[:, :JOBS]  # different digits
        chance = torch.rand(size, JOBS, len(digits), generator=generator)
        which = torch.where(digits == people.unsqueeze(-1), chance, -1.0).argmax(-1)
        yield images[which], hidden[people], assign(hidden[people])


def train(arm: tuple[str, str, str | None], seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Perfect assignments, and true cost above the best one, on test images, both in percent."""
    loss_name, estimator, curvature = arm
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, JOBS))
    fenchel_young = FenchelYoungLoss(assign, samples=args.samples, sigma=0.5, minimize=True)
    perturbed = PerturbedOptimizer(assign, samples=args.samples, sigma=0.5, minimize=True, estimator=estimator)
    hook = npl.LossHook(curvature=curvature, structure="mean") if curvature else None
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for people, _, observed in batches("train", args.steps, 32, seed):
        costs = network(people)
        if loss_name == "Fenchel-Young":
            loss = fenchel_young(costs, observed)
        else:  # the expected number of wrong entries
            loss = (perturbed(costs) * (1 - 2 * observed) + observed).sum((1, 2)).mean()
        optimizer.zero_grad()
        (hook(loss) if hook else loss).backward()
        optimizer.step()
        schedule.step()
    ((people, true, best),) = batches("test", 1, 1000, 0)
    with torch.no_grad():
        found = assign(network(people))
    perfect = (found == best).flatten(1).all(-1).float().mean()
    return 100 * perfect.item(), 100 * ((true * found).sum() / (true * best).sum() - 1).item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4, help="noisy copies of each problem")
    args = parser.parse_args(argv)
    print(f"{JOBS} people, {JOBS} jobs; 1000 sets of test images; mean over {args.seeds} seeds (lowest, highest).")
    print(f"The same untuned settings in all rows: Adam 1e-2, sigma 0.5, {args.samples} samples (finite_difference")
    print("calls the solver for as many more in its backward).\n")
    print(f"{'loss':15}{'estimator':19}{'Newton Losses':15}{'perfect %':20}{'excess cost %':15}")
    for arm in ARMS:
        runs = [train(arm, seed, args) for seed in range(args.seeds)]
        cells = [f"{sum(r) / len(r):5.1f} ({min(r):.1f}, {max(r):.1f})" for r in zip(*runs, strict=True)]
        print(f"{arm[0]:15}{arm[1]:19}{arm[2] or '-':15}{cells[0]:20}{cells[1]:15}", flush=True)


if __name__ == "__main__":
    main()
