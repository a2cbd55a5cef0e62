"""R small networks with parameters of their own, trained side by side in one batched network to fill a core.

A replica trains as it would alone: no operation mixes two of them. Adam and SGD act on each number by itself. So one
optimizer over the stacked parameters, with a learning rate for each network, equals R separate ones (tested against
torch.optim).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

__all__ = ["Adam", "Networks", "NormaliseByNorm", "Sgd", "clip_by_norm"]


_AT_ONCE = 125  # inputs that are evaluated together


class Networks:
    """R networks of one kind; their first weights depend on their seed alone.

    Args:
        make: a new network, with weights from torch's global generator.
        seeds: of the replicas.
        device: where they are trained; their first weights are the same on every device.
    """

    def __init__(self, make: Callable[[], nn.Module], seeds: Sequence[int], device: str = "cpu") -> None:
        made = []
        for seed in seeds:
            torch.manual_seed(seed)
            made.append(make())
        self._one = made[0]
        stacked, buffers = stack_module_state(made)
        if buffers:
            raise ValueError(f"a replica may have no buffers; got {sorted(buffers)}.")
        self._names = list(stacked)
        self._one_by_one = any(isinstance(layer, nn.Conv2d) for layer in self._one.modules())
        self.parameters: list[Tensor] = [p.detach().to(device).requires_grad_() for p in stacked.values()]
        self._layers = _in_order(self._one)
        self._head = max(k for k, layer in enumerate(self._layers) if isinstance(layer, nn.Linear))

    def __call__(self, inputs: Tensor) -> Tensor:
        """(R, N, ...) -> (R, N, ...)."""
        return self._forward(inputs, 0)

    def evaluate(self, inputs: Tensor) -> Tensor:
        """The same inputs (N, ...) through every replica: (R, N, ...), some at a time."""
        with torch.no_grad():
            return torch.cat([self._forward(part, None) for part in inputs.split(_AT_ONCE)], 1)

    def with_head(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What :meth:`__call__` returns, and the map from gradients there to those at the last layer.

        The map takes gradients (R, N, m) of the samples' losses at the outputs, and gives those at the last linear
        layer's weights, (R, N, D). What comes after that layer is applied once more.
        """
        seen: list[Tensor] = []
        layer = self._layers[self._head]
        handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

        def one(parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            out = functional_call(self._one, dict(zip(self._names, parameters, strict=True)), (x,))
            return out, seen.pop()

        try:
            outputs, features = vmap(one)(self.parameters, inputs)
        finally:
            handle.remove()
        features = features.detach()
        weight, bias = (p.detach() for p in self.parameters[-2:])
        after = self._layers[self._head + 1 :]

        def rest(z: Tensor) -> Tensor:
            for module in after:
                z = module(z)
            return z

        def head_of(gradient: Tensor) -> Tensor:
            r, n = gradient.shape[:2]
            z = torch.einsum("r...d,rkd->r...k", features, weight) + bias.reshape(r, *[1] * (features.ndim - 2), -1)
            with torch.enable_grad():
                z.requires_grad_()
                out = vmap(rest)(z)
                (at,) = torch.autograd.grad(out, z, gradient.reshape(out.shape).to(out.dtype))
            a = at.reshape(r, n, -1, at.shape[-1]).to(gradient.dtype)
            h = features.reshape(r, n, -1, features.shape[-1]).to(gradient.dtype)
            return torch.einsum("rnpk,rnpd->rnkd", a, h).flatten(2)

        return outputs, head_of

    def _forward(self, inputs: Tensor, batched: int | None) -> Tensor:
        def one(parameters: list[Tensor], x: Tensor) -> Tensor:
            return functional_call(self._one, dict(zip(self._names, parameters, strict=True)), (x,))

        if self._one_by_one:  # stacked convolutions are grouped ones, which are slow
            count = len(self.parameters[0])
            each = zip(
                *(p.unbind() for p in self.parameters), inputs if batched == 0 else [inputs] * count, strict=True
            )
            return torch.stack([one(list(parameters), x) for *parameters, x in each])
        return vmap(one, in_dims=(0, batched))(self.parameters, inputs)


def _in_order(network: nn.Module) -> list[nn.Module]:
    """The layers of nested nn.Sequentials."""
    if not isinstance(network, nn.Sequential):
        return [network]
    return [layer for child in network for layer in _in_order(child)]


class _Optimizer:
    """Stacked parameters (R, ...) with a learning rate for each replica that decays to zero by a cosine."""

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[float], steps: int) -> None:
        self.parameters, self.steps, self.taken = parameters, steps, 0
        self._rates = [torch.tensor(rates).reshape(-1, *[1] * (p.ndim - 1)).to(p) for p in parameters]

    def _decay(self) -> float:
        decay = (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        self.taken += 1
        return decay


class Adam(_Optimizer):
    """torch.optim.Adam with CosineAnnealingLR."""

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[float], steps: int, beta2: float = 0.999) -> None:
        super().__init__(parameters, rates, steps)
        self.betas = (0.9, beta2)
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of all replicas."""
        decay, (a, b), t = self._decay(), self.betas, self.taken
        rows = zip(self.parameters, gradients, self._first, self._second, self._rates, strict=True)
        for p, g, first, second, rate in rows:
            first.lerp_(g, 1 - a)
            second.mul_(b).addcmul_(g, g, value=1 - b)
            denominator = second.sqrt().div_((1 - b**t) ** 0.5).add_(1e-8)
            p.sub_(first / denominator * (rate * (decay / (1 - a**t))))


class Sgd(_Optimizer):
    """torch.optim.SGD with momentum .9 and CosineAnnealingLR."""

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[float], steps: int) -> None:
        super().__init__(parameters, rates, steps)
        self._momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of all replicas."""
        decay = self._decay()
        for p, g, momentum, rate in zip(self.parameters, gradients, self._momentum, self._rates, strict=True):
            momentum.mul_(0.9).add_(g)
            p.sub_(momentum * (rate * decay))


class NormaliseByNorm:
    """Divides the gradient of each replica by its norm, root mean square over the batches so far (decay .9)."""

    def __init__(self) -> None:
        self._total, self._weight = 0.0, 0.0

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients (R, ...) in and out."""
        squared = sum(g.flatten(1).square().sum(1) for g in gradients)
        self._total, self._weight = 0.9 * self._total + 0.1 * squared, 0.9 * self._weight + 0.1
        size = torch.as_tensor(self._total / self._weight)
        factor = size.clamp_min(torch.finfo(gradients[0].dtype).tiny).rsqrt()
        return [g * factor.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients]


def clip_by_norm(gradients: Sequence[Tensor], most: Tensor) -> list[Tensor]:
    """torch.nn.utils.clip_grad_norm_ for each replica: gradients (R, ...), most (R,)."""
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factor = (most.to(norm) / (norm + 1e-6)).clamp(max=1.0)
    return [g * factor.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients]
