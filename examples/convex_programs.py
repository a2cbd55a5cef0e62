"""Three convex programs as layers: a linear, a quadratic and a second-order cone program, and what flows back.

python -m examples.convex_programs
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex import ConvexLayer, solve_qp


def transport() -> None:
    """Linear: two factories serve three shops at least cost; the gradients are the shadow prices.

    The multipliers say what one more unit of demand costs, and so does the gradient of the cost.
    """
    cost = torch.tensor([[4.0, 6.0, 9.0], [5.0, 3.0, 2.0]], dtype=torch.float64)
    supply = torch.tensor([30.0, 40.0], dtype=torch.float64)
    demand = torch.tensor([20.0, 25.0, 15.0], dtype=torch.float64, requires_grad=True)
    rows = torch.kron(torch.eye(2), torch.ones(1, 3)).double()  # sums over the shops of one factory
    columns = torch.kron(torch.ones(1, 2), torch.eye(3)).double()  # sums over the factories that serve one shop
    solution = solve_qp(
        torch.zeros(6, 6, dtype=torch.float64),
        cost.flatten(),
        columns,
        demand,
        torch.cat([rows, -torch.eye(6, dtype=torch.float64)]),
        torch.cat([supply, torch.zeros(6, dtype=torch.float64)]),
    )
    total = (cost.flatten() * solution.x).sum()
    (price,) = torch.autograd.grad(total, demand)
    print("linear: plan", solution.x.detach().reshape(2, 3).tolist())
    print(f"  cost {total.item():.2f}, price of one more unit in each shop {price.tolist()}")
    assert torch.allclose(price, -solution.nu, atol=1e-9)


def smoothing() -> None:
    """Quadratic: the monotone curve nearest to noisy data, in a batch that shares its matrices."""
    torch.manual_seed(0)
    n = 8
    data = (torch.linspace(0, 1, n) + 0.3 * torch.randn(4, n)).requires_grad_()
    falls = torch.eye(n)[:-1] - torch.eye(n)[1:]  # x_i - x_(i+1) <= 0
    solution = solve_qp(torch.eye(n), -data, G=falls, h=torch.zeros(n - 1))
    print("quadratic: isotonic fits\n", solution.x.detach().numpy().round(2))
    jacobian = -solution.jacobian("p")[0]  # p = -data: how the first fit moves with its data
    print("  the fit is a mean over blocks: rows of dx/d(data)\n", jacobian.detach().numpy().round(2))
    print(f"  solver: {solution.solver}; active rows: {solution.active.sum(-1).tolist()}")


def robust_portfolio() -> None:
    """Second-order cone: the best portfolio for the worst returns within an ellipsoid around the forecast."""

    def objective(x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        return -(theta["forecast"] @ x[:-1]) + x[-1]

    def cone(x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        risk = torch.linalg.vector_norm(theta["root"] @ x[:-1])
        return torch.cat([(theta["doubt"] * risk - x[-1])[None], -x[:-1]])

    layer = ConvexLayer(objective, lambda x, theta: x[:-1].sum()[None] - 1, cone, variables=4)
    theta = {
        "forecast": torch.tensor([0.10, 0.07, 0.03], dtype=torch.float64),
        "root": torch.diag(torch.tensor([0.30, 0.15, 0.05], dtype=torch.float64)),
        "doubt": torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    }
    weights = layer(theta)[:-1]
    (slope,) = torch.autograd.grad(weights[0], theta["doubt"])
    print("cone: weights", weights.detach().numpy().round(3), f"; d(weight of the boldest)/d(doubt) = {slope:.3f}")


if __name__ == "__main__":
    transport()
    smoothing()
    robust_portfolio()
