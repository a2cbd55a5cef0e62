"""The last layer below a boundary, against gradients of its weight that autograd makes sample by sample."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel.distributed import _DDPSink
from torch.utils.checkpoint import checkpoint

from newton_plugin._boundary import head_layer, head_places
from newton_plugin._boundary.autograd_graph import edge_of
from newton_plugin._boundary.head import Head, find_head
from newton_plugin._boundary.rows import layout_of
from newton_plugin._errors import ShapeError

G = torch.Generator().manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def seeded(layer: nn.Module) -> Any:
    """A layer in float64 whose numbers depend on nothing but their places."""
    g = torch.Generator().manual_seed(1)
    layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    return layer


def hidden(x: Tensor) -> Tensor:
    """Data that a layer below made, so that they require grad."""
    return torch.tanh(seeded(nn.Linear(x.shape[-1], x.shape[-1]))(x))


def look(y: Tensor, features: tuple[int, ...] | None = None) -> Head | str:
    return find_head(edge_of(y), layout_of(tuple(y.shape), features))


def found(y: Tensor, features: tuple[int, ...] | None = None) -> Head:
    head = look(y, features)
    assert isinstance(head, Head), head
    return head


def reason(y: Tensor, features: tuple[int, ...] | None = None) -> str:
    head = look(y, features)
    assert isinstance(head, str)
    return head


def check(
    y: Tensor, weight: Tensor, features: tuple[int, ...] | None = None, *, rtol: float = 1e-12, transposed: bool = False
) -> Head:
    """The sum over positions is the gradient of each sample's loss at the weight; the backward pass stays as it was."""
    layout = layout_of(tuple(y.shape), features)
    rows = torch.randn(layout.rows, layout.features, generator=G, dtype=torch.float64)
    before = torch.autograd.grad(y, weight, layout.from_rows(rows).to(y.dtype), retain_graph=True)
    head = found(y, features)
    got = torch.einsum("npk,npd->nkd", head.gradients(rows), head.inputs.double())
    wanted = []
    for i in range(layout.rows):
        of_one = torch.zeros_like(rows)
        of_one[i] = rows[i]
        (gradient,) = torch.autograd.grad(y, weight, layout.from_rows(of_one).to(y.dtype), retain_graph=True)
        wanted.append((gradient.mT if transposed else gradient).double().reshape(got.shape[1:]))
    torch.testing.assert_close(got, torch.stack(wanted), rtol=rtol, atol=rtol)
    after = torch.autograd.grad(y, weight, layout.from_rows(rows).to(y.dtype))
    assert torch.equal(before[0], after[0])
    assert not head.inputs.requires_grad
    return head


# The layer's outputs, and their positions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (6, 3, 5), (6, 2, 3, 5), (1, 5)])
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    layer = seeded(nn.Linear(5, 4, bias=bias))
    for x in (data(*shape), hidden(data(*shape))):
        y = layer(x)
        if len(shape) == 1:
            y = y[None]
        head = check(y, layer.weight)
        assert head.inputs.shape == (y.shape[0], y[0].numel() // 4, 5)
        assert head.features == 4


def test_inputs_whose_dimensions_are_not_in_order() -> None:
    layer = seeded(nn.Linear(5, 4))
    check(layer(data(5, 3, 6).permute(2, 1, 0)), layer.weight)


def test_a_single_output_without_a_dimension_of_its_own() -> None:
    w = nn.Parameter(data(5))
    check(data(6, 5) @ w, w)
    check(data(6, 3, 5) @ w, w)
    check(torch.addmv(data(6), data(6, 5), w, alpha=3), w)


def test_products_written_by_hand() -> None:
    w, tall = nn.Parameter(data(5, 4)), nn.Parameter(data(4, 5))
    check(data(6, 5) @ w, w, transposed=True)
    check(torch.addmm(data(4), data(6, 5), w, alpha=2.5), w, transposed=True)
    check((tall @ data(5, 6)).mT, tall)  # the columns of the right factor are the samples
    check((tall @ hidden(data(6, 5)).mT).mT, tall)
    check(torch.einsum("bti,oi->bto", data(6, 3, 5), tall), tall)
    check(torch.bmm(data(6, 3, 5), w.expand(6, 5, 4)), w, transposed=True)
    stack_of_one = nn.Parameter(data(1, 5, 4))
    check(torch.bmm(data(1, 6, 5), stack_of_one)[0], stack_of_one, transposed=True)
    check(torch.baddbmm(data(6, 3, 4), data(6, 3, 5), w.expand(6, 5, 4), alpha=2), w, transposed=True)


def test_data_that_require_grad_are_no_weight() -> None:
    layer, x = seeded(nn.Linear(5, 4)), data(6, 5).requires_grad_()
    check(layer(x), layer.weight)
    check((layer.weight @ x.mT).mT, layer.weight)
    w = data(5, 4).requires_grad_()  # without parameters, as torch.func has it, leaves are weights
    check(x @ w, w, transposed=True)


def test_a_weight_that_was_computed() -> None:
    layer = seeded(nn.Linear(5, 4))
    w = layer.weight * 2
    head = found(F.linear(data(6, 5), w))
    assert head.inputs.shape == (6, 1, 5)


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda y: y.flatten(1),
    "unflatten": lambda y: y.unflatten(2, (2, 2)),
    "softplus": F.softplus,
    "sigmoid of flat": lambda y: torch.sigmoid(y.flatten(1)),
    "tanh, then more": lambda y: torch.tanh(y).unsqueeze(1).exp() * 2 - 1,
    "permuted": lambda y: y.permute(0, 2, 1),
    "permuted and flat": lambda y: y.permute(0, 2, 1).flatten(1),
    "permuted function": lambda y: F.gelu(y).transpose(1, 2),
    "positions first": lambda y: y.transpose(0, 1),
    "positions first, a function": lambda y: torch.sigmoid(y.transpose(0, 1)),
    "temperature": lambda y: y / 0.1,
    "own temperature": lambda y: y / nn.Parameter(torch.tensor(0.7, dtype=torch.float64)),
    "bias of its own": lambda y: y + nn.Parameter(torch.ones(4, dtype=torch.float64)),
    "mask added": lambda y: y + torch.tensor([0.0, -1e4, 0.0, 0.0], dtype=torch.float64),
    "mask before it": lambda y: torch.ones(4, dtype=torch.float64) - 2 * y,
    "subtracted twice over": lambda y: torch.sub(torch.ones_like(y), y, alpha=3),
    "filled": lambda y: y.masked_fill(torch.tensor([False, True, False, False]), 0.0),
    "where": lambda y: torch.where(torch.tensor([False, True, False, True]), y, torch.zeros_like(y)),
    "slice of features": lambda y: y[..., :3],
    "slice of a function": lambda y: torch.sigmoid(y)[..., 1:4:2],
    "slice of positions": lambda y: y[:, 1:],
    "one position": lambda y: y[:, -1],
    "one feature": lambda y: y[..., 2],
    "some samples": lambda y: y[2:5],
    "a part": lambda y: y.split([1, 3], 2)[1],
    "a half": lambda y: y.chunk(2, -1)[0],
    "unbound": lambda y: y.unbind(1)[1],
    "flipped": lambda y: y.flip(1, 2),
    "softmax": lambda y: torch.softmax(y, -1),
    "softmax over positions": lambda y: torch.log_softmax(y, 1),
    "softmax, then a slice": lambda y: torch.softmax(y, 1)[:, :1, :2],
    "cast": lambda y: y.float().double(),
    "contiguous": lambda y: y.mT.contiguous(),
    "clipped": lambda y: y.clamp(-1, 1).neg(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("features", [None, (-1,)])
def test_what_a_network_ends_with(end: str, features: tuple[int, ...] | None) -> None:
    layer = seeded(nn.Linear(5, 4))
    y = ENDS[end](layer(hidden(data(6, 3, 5))))
    rtol = 1e-6 if end == "cast" else 1e-12
    if isinstance(head := look(y, features), Head):
        check(y, layer.weight, features, rtol=rtol)
    else:  # one position may serve several rows where the last dimension is not that of the layer's outputs
        assert features is not None, head
        assert _mixes(y, features), head


def test_every_token_may_be_a_sample() -> None:
    layer = seeded(nn.Linear(5, 4))
    head = check(layer(data(6, 3, 5)), layer.weight, (-1,))
    assert head.inputs.shape == (18, 1, 5)
    head = check(layer(data(6, 3, 5)).permute(0, 2, 1), layer.weight, (1,))
    assert head.inputs.shape == (18, 1, 5)


def test_lists() -> None:
    scorer = seeded(nn.Linear(5, 1))
    x = data(6 * 7, 5)
    assert check(scorer(x).view(6, 7), scorer.weight).inputs.shape == (6, 7, 5)
    assert check(scorer(x.view(6, 7, 5)).squeeze(-1), scorer.weight).inputs.shape == (6, 7, 5)
    check(torch.sigmoid(scorer(x).view(6, 7)), scorer.weight)
    check(scorer(x).view(7, 6).mT, scorer.weight)  # item first: samples are out of order


def test_where_only_views_lie_between_the_gradients_are_a_view_of_the_rows() -> None:
    layer = seeded(nn.Linear(5, 4))
    x = data(6, 3, 5)
    for y in (layer(x), layer(x).flatten(1), layer(x).permute(0, 2, 1), layer(x).transpose(0, 1), layer(x) + 1.0):
        rows = data(y.shape[0], y[0].numel())
        assert found(y).gradients(rows).data_ptr() == rows.data_ptr()
    assert found(layer(x)).inputs.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_any_dtype_and_any_strides(dtype: torch.dtype) -> None:
    layer = seeded(nn.Linear(5, 4)).float()
    for y in (layer(data(6, 5).float()), torch.sigmoid(layer(data(6, 5).float()))):
        head, rows = found(y), data(4, 6).to(dtype).T
        got = head.gradients(rows)
        assert got.dtype == dtype
        (wanted,) = torch.autograd.grad(y, layer.bias, rows.float())
        torch.testing.assert_close(got.float().sum((0, 1)), wanted, rtol=2e-2, atol=2e-2)


def test_rows_of_a_wrong_shape_are_refused() -> None:
    head = found(seeded(nn.Linear(5, 4))(data(6, 5)))
    with pytest.raises(ShapeError, match=r"\(6, 4\).*got \(6, 3\)"):
        head.gradients(data(6, 3))


def test_a_second_graph_of_the_same_form_has_its_own_numbers() -> None:
    layer = seeded(nn.Linear(5, 4))
    for _ in range(2):
        check(layer(data(6, 3, 5)).transpose(0, 1), layer.weight)
        check(layer(data(6, 3, 5)).transpose(0, 2), layer.weight, (0,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda y: y[:, :2], lambda y: y[:, 1:]),
        (lambda y: y[:, 0], lambda y: y[:, 1]),
        (lambda y: y[:, ::2], lambda y: y[:, 1:]),
        (lambda y: y.unbind(1)[0], lambda y: y.unbind(1)[1]),
        (lambda y: y.flip(1), lambda y: y.flip(0)),
        (lambda y: y.transpose(0, 1), lambda y: y.transpose(1, 2)),
        (lambda y: y.permute(1, 2, 0), lambda y: y.permute(2, 0, 1)),
        (lambda y: torch.softmax(y, 1)[:, :1], lambda y: torch.softmax(y, 2)[:, :1]),
    ],
)
def test_moves_of_the_same_shapes_are_told_apart(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    layer = seeded(nn.Linear(5, 3))
    for end in (one, other, one):
        y = end(layer(data(3, 3, 5)))
        if isinstance(head := look(y), Head):
            check(y, layer.weight)
        else:
            assert _mixes(y, None), head


# Precision


def test_half_precision() -> None:
    layer = seeded(nn.Linear(5, 4)).bfloat16()
    for y in (layer(data(6, 3, 5).bfloat16()), torch.sigmoid(layer(data(6, 5).bfloat16()))):
        head = check(y, layer.weight, rtol=0.1)
        assert head.inputs.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_autocast(bias: bool) -> None:
    layer = seeded(nn.Linear(5, 4, bias=bias)).float()
    with torch.autocast("cpu", torch.bfloat16):
        for y in (layer(data(6, 3, 5).float()), torch.tanh(layer(data(6, 5).float()).float())):
            check(y, layer.weight, rtol=0.1)


# Convolutions


@pytest.mark.parametrize("features", [None, (1,)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(2, 3, 1),
        lambda: nn.Conv2d(2, 3, 1, stride=2, padding=1),
        lambda: nn.Conv2d(2, 3, 3, padding=1),
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), bias=False),
        lambda: nn.Conv2d(2, 3, 3, dilation=2, padding="same"),
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    ],
)
def test_convolutions(build: Callable[[], nn.Module], features: tuple[int, ...] | None) -> None:
    layer = seeded(build())
    x = data(2, 2, 6, 5)
    check(layer(x), layer.weight, features)
    check(torch.sigmoid(layer(x)), layer.weight, features)
    if features is None:
        check(layer(x).flatten(1), layer.weight)


def test_convolutions_of_one_and_three_dimensions() -> None:
    one, three = seeded(nn.Conv1d(2, 3, 3, stride=2, padding=1)), seeded(nn.Conv3d(2, 3, (2, 1, 3)))
    check(one(data(4, 2, 7)), one.weight)
    check(one(data(4, 2, 7)).mT, one.weight, (2,))
    check(three(data(2, 2, 3, 4, 5)), three.weight)
    check(one(data(2, 7))[None], one.weight)  # an image without a batch


@pytest.mark.parametrize("order", [(2, 0, 1, 3), (2, 3, 1, 0), (3, 1, 2, 0)])
def test_images_whose_samples_are_not_first(order: tuple[int, ...]) -> None:
    layer = seeded(nn.Conv2d(2, 3, 1))
    check(layer(data(4, 2, 6, 5)).permute(order), layer.weight)
    check(layer(data(4, 2, 6, 5)).permute(order), layer.weight, (order.index(1), 3 if order[3] != 1 else 2))


def test_a_pointwise_convolution_is_a_linear_layer_without_a_copy() -> None:
    layer, x = seeded(nn.Conv2d(2, 3, 1)), data(4, 2, 6, 5)
    head = found(layer(x))
    assert head.inputs.data_ptr() == x.data_ptr()
    torch.testing.assert_close(head.inputs, x.flatten(2).mT)


def test_large_convolutions_keep_the_centre_of_each_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_layer, "MOST_NUMBERS_IN_PATCHES", 100)
    layer, x = seeded(nn.Conv2d(2, 3, 3, padding=1)), data(4, 2, 6, 5)
    y = layer(x)
    rows = data(4, 90)
    head = found(y)
    got = torch.einsum("npk,npd->kd", head.gradients(rows), head.inputs)
    (wanted,) = torch.autograd.grad(y, layer.weight, rows.view(y.shape))
    torch.testing.assert_close(got, wanted[:, :, 1, 1], rtol=1e-12, atol=1e-12)
    assert "too many to unfold" in reason(seeded(nn.Conv2d(2, 3, 3))(x))
    for of_equal_size in (nn.Conv1d(2, 3, 3, stride=2, padding=21), nn.Conv1d(2, 3, 2, dilation=2, padding=1)):
        y = seeded(of_equal_size)(data(4, 2, 41))
        assert y.shape[2] == 41
        assert "too many to unfold" in reason(y)


@pytest.mark.parametrize(
    ("build", "words"),
    [(lambda: nn.Conv2d(2, 4, 3, groups=2), "in groups"), (lambda: nn.ConvTranspose2d(2, 3, 3), "transposed")],
)
def test_other_convolutions_are_refused(build: Callable[[], nn.Module], words: str) -> None:
    assert words in reason(seeded(build())(data(2, 2, 6, 5)))


# No head


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2 * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Wrapped(Tensor):
    """A tensor that torch's operations do not see through, as a sharded one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*(a.held if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))
        return Wrapped(result) if func is torch.ops.aten.detach.default else result


def test_inputs_that_are_no_plain_tensors_are_named() -> None:
    assert "no plain tensor (Wrapped)" in reason(seeded(nn.Linear(5, 4))(Wrapped(data(6, 5))))


def test_what_made_the_outputs_is_named_where_it_is_no_linear_layer() -> None:
    layer, x = seeded(nn.Linear(5, 4)), hidden(data(6, 5))
    y = layer(x)
    assert "DoubledBackward" in reason(Doubled.apply(y))
    assert "AddBackward0 joins 2" in reason(y + seeded(nn.Linear(5, 4))(x))
    assert "MulBackward0 joins 2" in reason(y * y)
    assert "Embedding" in reason(seeded(nn.Embedding(9, 4))(torch.arange(6)))
    assert "Stack" in reason(torch.stack([y, y]))
    assert "Layer" in reason(seeded(nn.LayerNorm(4))(y))
    assert "shape" in reason(y[:, :1] + torch.zeros(6, 4, dtype=y.dtype))
    assert "shape" in reason(y[:1].expand(6, 4))
    assert "Index" in reason(y[[1, 0, 2]])
    assert "leaf" in reason(nn.Parameter(data(6, 4)))
    assert "leaf" in reason(nn.Parameter(data(6, 4)) * data(6, 4))
    assert "neither factor" in reason(torch.bmm(hidden(data(6, 3, 5)), hidden(data(6, 3, 5)).mT))
    assert "several weights" in reason(torch.bmm(data(6, 3, 5), nn.Parameter(data(6, 5, 4))))
    assert "left factor" in reason(torch.bmm(nn.Parameter(data(6, 3, 5)), data(6, 5, 4)))
    assert "no outputs" in reason(y[:, :0])
    assert "transpos" in reason(seeded(nn.ConvTranspose1d(2, 3, 3))(data(2, 2, 6)))


def test_a_process_without_samples_knows_the_widths() -> None:
    """Others may have some, and their sums have to fit together."""
    for layer, x in (
        (nn.Linear(5, 4), data(0, 5)),
        (nn.Linear(5, 1), data(0, 3, 5)),
        (nn.Conv1d(2, 3, 3), data(0, 2, 6)),
    ):
        y = seeded(layer)(hidden(x))
        head = found(y)
        width = layer.weight[0].numel()
        assert head.inputs.shape == (0, 1, width)
        rows = torch.zeros(0, y[:0].flatten(1).shape[1] if y.ndim > 1 else 1, dtype=y.dtype)
        assert head.gradients(rows).shape == (0, 1, len(layer.weight))


def test_recurrent_layers_are_named() -> None:
    torch.manual_seed(0)
    y, _ = nn.LSTM(5, 4, batch_first=True)(data(6, 3, 5).float())
    assert "Backward" in reason(y)


def test_a_frozen_weight_is_said() -> None:
    for layer, shape in ((seeded(nn.Linear(5, 4)), (6, 5)), (seeded(nn.Conv1d(5, 4, 1)), (6, 5, 2))):
        layer.weight.requires_grad_(False)
        assert "frozen" in reason(layer(data(*shape)))
        assert "frozen" in reason(layer(data(*shape).requires_grad_()))
    assert "frozen" in reason(hidden(data(6, 5)) @ data(5, 4))


def test_a_graph_that_was_freed_and_an_input_that_was_changed_are_said() -> None:
    layer, x = seeded(nn.Linear(5, 4)), data(6, 5)
    y = layer(x)
    edge, layout = edge_of(y), layout_of((6, 4), None)
    y.sum().backward()
    assert "freed" in str(find_head(edge, layout))
    y = layer(x)
    x += 1
    assert "in place" in reason(y)


def test_positions_that_belong_to_several_samples() -> None:
    layer = seeded(nn.Linear(5, 4))
    y = layer(data(6, 5))
    assert "several samples" in reason(y.view(8, 3))
    assert "several samples" in reason(seeded(nn.Linear(5, 2))(data(6, 5)).view(4, 3))
    w = nn.Parameter(data(5, 2))
    assert "several samples" in reason(torch.bmm(data(2, 3, 5), w.expand(2, 5, 2)).view(3, 4))
    assert "several samples" in reason(y.mT)
    assert "several samples" in reason(y.mT.reshape(6, 4))
    assert "mixes samples" in reason(torch.softmax(y, 0))
    uneven = layer(data(5, 5)).view(20)[2:18].view(2, 8)  # the first sample has three positions, two of them in part
    assert "several samples" in reason(uneven)
    every_third = layer(data(5, 5)).view(20)[::3][:4].view(2, 2)  # positions 0, 0 and 1, 2
    assert "different numbers" in reason(every_third)


def test_moves_of_too_many_numbers_are_not_followed_unless_strides_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_places, "MOST_NUMBERS", 10)
    layer = seeded(nn.Linear(5, 4))
    check(layer(data(11, 3, 5)).flatten(1), layer.weight)
    check(layer(data(11, 3, 5)), layer.weight, (2,))
    assert "more than 10 outputs" in reason(layer(data(11, 3, 5)).permute(0, 2, 1))
    assert "not all are used" in reason(layer(data(2, 9, 5))[:, 0])


# Checkpoints and compilers


def test_checkpoints_are_said_and_left_alone() -> None:
    layer = seeded(nn.Linear(5, 4))
    calls = []

    def network(x: Tensor) -> Tensor:
        calls.append(1)
        return layer(x)

    x = data(6, 5).requires_grad_()
    assert "CheckpointFunction" in reason(checkpoint(network, x, use_reentrant=True))
    y = checkpoint(network, x, use_reentrant=False)
    if not hasattr(y.grad_fn._raw_saved_mat1, "unpack_hook"):
        check(y, layer.weight)
        return
    calls.clear()
    assert "inside of a checkpoint" in reason(y)
    assert not calls


def test_hooks_that_move_saved_tensors_are_run() -> None:
    layer = seeded(nn.Linear(5, 4))
    with torch.autograd.graph.save_on_cpu():
        y = torch.sigmoid(layer(data(6, 5)))
    check(y, layer.weight)


def test_a_module_with_hooks_on_its_backward_pass_is_seen_through() -> None:
    layer = seeded(nn.Linear(5, 4))
    network = nn.Sequential(layer, nn.Sigmoid())
    for module in network.modules():
        module.register_full_backward_hook(lambda module, inputs, outputs: None)
    check(network(hidden(data(6, 5))), layer.weight)


def test_what_ddp_returns_is_seen_through() -> None:
    layer = seeded(nn.Linear(5, 4))
    y, z = layer(data(6, 5)), layer(data(7, 5))
    model = nn.Module()
    model._ddp_sink_clone = True  # type: ignore[assignment]
    for handed, outputs in zip(_DDPSink.apply(weakref.ref(model), y, z), (y, z), strict=True):
        head = found(handed)
        assert handed.grad_fn.name() == "_DDPSinkBackward"
        torch.testing.assert_close(head.inputs, found(outputs).inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_is_seen_where_its_graph_is() -> None:
    torch.compiler.reset()
    layer = seeded(nn.Linear(5, 4))
    check(torch.compile(layer, backend="eager")(data(6, 5)), layer.weight)
    assert "CompiledFunction" in reason(torch.compile(layer, backend="aot_eager")(data(6, 5)))


def test_no_warning_and_no_gradient_left_behind() -> None:
    layer = seeded(nn.Linear(5, 4))
    y = torch.sigmoid(layer(data(6, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = found(y).gradients(data(6, 4).requires_grad_())
    assert layer.weight.grad is None
    assert not got.requires_grad


# Chains

SIZES = (4, 2, 3)
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda y: y.reshape(y.shape[0], -1),
    "split": lambda y: y.reshape(y.shape[0], 2, -1) if y[0].numel() % 2 == 0 else y,
    "split the other way": lambda y: y.reshape(y.shape[0], -1, 3) if y[0].numel() % 3 == 0 else y,
    "swap": lambda y: y.transpose(1, -1) if y.ndim > 2 else y,
    "swap with samples": lambda y: y.transpose(0, 1),
    "merge samples": lambda y: y.reshape(-1, y.shape[-1]),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "shorter": lambda y: y[..., : max(1, y.shape[-1] - 1)],
    "fewer": lambda y: y[:, 1:] if y.shape[1] > 1 else y,
    "flip": lambda y: y.flip(-1),
    "tanh": torch.tanh,
    "scale": lambda y: y * 0.5,
    "shift": lambda y: y + 1.0,
    "softmax": lambda y: torch.softmax(y, -1) if y.shape[-1] > 1 else y,  # of one entry it is constant
    "double": lambda y: y.clone(),
}


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(LINKS)), max_size=5),
    shape=st.tuples(*(st.integers(1, size) for size in SIZES)),
    last=st.booleans(),
)
def test_any_chain_of_moves_and_functions(names: list[str], shape: tuple[int, ...], last: bool) -> None:
    layer = seeded(nn.Linear(2, 3))
    y = layer(data(*shape, 2))
    for name in names:
        y = LINKS[name](y)
    features = (y.ndim - 1,) if last else None
    if isinstance(head := look(y, features), Head):
        check(y, layer.weight, features)
    else:
        assert _mixes(y, features), head


def _mixes(y: Tensor, features: tuple[int, ...] | None) -> bool:
    """Whether samples share a position, or have different numbers of them: seen from derivatives of each output."""
    layout = layout_of(tuple(y.shape), features)
    node: Any = y.grad_fn
    while node.name() != "AddmmBackward0":
        node = next(child for child, _ in node.next_functions if child is not None)
    count = node._input_metadata[0].shape[0]
    used = torch.zeros(layout.rows, count, dtype=torch.bool)
    hit: list[Tensor] = []
    handle = node.register_prehook(lambda gradients: hit.append(gradients[0]))
    for i in range(layout.rows):
        of_one = torch.zeros(layout.rows, layout.features, dtype=torch.float64)
        of_one[i] = data(layout.features)
        torch.autograd.backward(y, layout.from_rows(of_one), retain_graph=True)
        used[i] = hit.pop().ne(0).any(-1)
    handle.remove()
    return bool((used.sum(0) > 1).any()) or len(set(used.sum(1).tolist())) > 1
