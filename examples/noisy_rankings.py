"""Learn to rank digits from lists of which 30 % are corrupted, and find out which ones: bilevel optimization.

Each of 400 training lists has a weight. The lower level trains the network on the weighted lists, with plain
gradients or with Newton Losses; the upper level moves the weights so that the network ranks 100 clean lists well.

    python -m examples.noisy_rankings
"""

import argparse

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import newton_plugin as npl
from examples.digit_lists import DigitLists
from newton_plugin.algorithms import RankingLoss
from newton_plugin.bilevel import MASOBA

ranking_loss = RankingLoss("neural_sort", temperature=1.0)
each_list = RankingLoss("neural_sort", temperature=1.0, reduction="none")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(-2))  # (..., n, 64) -> (..., n)


def newton_losses(scores: Tensor, ranks: Tensor) -> Tensor:
    """``1/2 ||scores - target||^2`` of each list: the target is a constant, the Newton step away from the scores."""
    target = npl.newton_step(ranking_loss, scores, ranks, structure="mean").target
    return (scores - target).square().sum(-1) / 2


def accuracy(net: nn.Module, lists: DigitLists) -> float:
    """Per cent of the images at their right place."""
    with torch.no_grad():
        right = [(net(images).argsort(-1).argsort(-1) == ranks).double().mean() for images, ranks in lists]
    return 100 * float(sum(right)) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    images, ranks = next(iter(DigitLists("train", 5, 400, 1, options.seed)))
    wrong = torch.rand(len(ranks)) < 0.3
    shuffled = torch.rand(ranks.shape).argsort(-1)
    ranks = torch.where(wrong.unsqueeze(-1), shuffled, ranks)
    clean_images, clean_ranks = next(iter(DigitLists("validation", 5, 100, 1, options.seed)))
    test = DigitLists("test", 5, 500, 4, 2, fixed=True)

    def train(weighted: bool, newton: bool) -> tuple[float, float]:
        net, logits = network(), torch.zeros(len(ranks), requires_grad=True)
        loss = newton_losses if newton else each_list
        rates = {"lr_lower": 0.1, "lr_upper": 300.0} if newton else {"lr_lower": 1.0, "lr_upper": 100.0}
        batch = torch.arange(0)

        def lower() -> Tensor:
            losses = loss(net(images[batch]), ranks[batch])
            weights = logits[batch].sigmoid() * 2
            return (weights * losses).mean() + 1e-3 * sum(p.square().sum() for p in net.parameters())

        def upper() -> Tensor:
            return ranking_loss(net(clean_images), clean_ranks)

        optimizer = MASOBA([logits], net.parameters(), **rates)
        plain = torch.optim.SGD(net.parameters(), lr=rates["lr_lower"])
        for step in range(options.steps):
            batch = torch.randint(0, len(ranks), (64,))
            if weighted and step >= options.steps // 5:
                optimizer.step(upper, lower)
            else:
                plain.zero_grad()
                lower().backward()
                plain.step()
        return accuracy(net, test), float(roc_auc_score(wrong, -logits.detach()))

    print("images at their right place (test lists), and AUROC of the weights finding corrupted lists")
    for newton in (False, True):
        for weighted in (False, True):
            percent, auroc = train(weighted, newton)
            name = ("Newton Losses" if newton else "plain gradients") + (", learned weights" if weighted else "")
            print(f"{name:34s} {percent:5.1f} %   {f'{auroc:.3f}' if weighted else ''}")


if __name__ == "__main__":
    main()
