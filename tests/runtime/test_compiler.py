"""``torch.compile`` of the network, of the loss, of both, of the LightningModule: exact, or a warning or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tests.cases import curved
from tests.distributed.scenarios import BATCHES, network
from tests.lightning.fits import Batches, plain_module, trainer
from tests.twins import relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
CURVATURES = ["fisher", "hessian"]
EXACT = [npl.EmpiricalFisher("isotropic"), "hessian"]  # a gated rule looks at a layer that is hidden there
SPLIT = "newton_plugin uses the empirical Fisher in place of Hessian.*double backward"
pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    # Of the compiler's own parts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def plain(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return curved(model(x), t)


def trained(loss: Loss, hook: Callable[[Tensor], Tensor], batches: Any = BATCHES) -> Tensor:
    """Parameters after a few steps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, t in batches:
        optimizer.zero_grad()
        hook(loss(model, x, t)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def expected(curvature: Any) -> Tensor:
    return trained(plain, npl.LossHook(curvature=curvature))


@pytest.mark.parametrize("curvature", EXACT, ids=str)
def test_a_compiled_network_is_exact(backend: str, curvature: Any) -> None:
    compiled: dict[int, Any] = {}

    def loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        forward = compiled.setdefault(id(model), torch.compile(model, backend=backend))
        return curved(forward(x), t)

    assert relative_error(trained(loss, npl.LossHook(curvature=curvature)), expected(curvature)) <= 1e-10


def test_a_compiled_loss_is_exact_for_fisher(backend: str) -> None:
    compiled = torch.compile(curved, backend=backend)
    ours = trained(lambda model, x, t: compiled(model(x), t), npl.LossHook())
    assert relative_error(ours, expected("fisher")) <= 1e-10


@pytest.mark.parametrize("door", ["hook", "wrapper"])
def test_a_compiled_loss_has_no_hessian_and_that_is_said(backend: str, door: str) -> None:
    """Never a silent zero: Fisher takes its place, with one warning."""
    compiled = torch.compile(curved, backend=backend)
    if door == "wrapper":
        compiled, hook = npl.newton_loss(compiled, curvature="hessian"), lambda loss: loss
    else:
        hook = npl.LossHook(curvature="hessian")
    with pytest.warns(UserWarning, match=SPLIT) as caught:
        ours = trained(lambda model, x, t: compiled(model(x), t), hook)
    assert len([w for w in caught if "newton_plugin" in str(w.message)]) == 1
    assert relative_error(ours, expected(npl.EmpiricalFisher())) <= 1e-10


@pytest.mark.parametrize("door", ["hook", "wrapper"])
def test_a_compiled_loss_that_was_trained_plainly_before(backend: str, door: str) -> None:
    """Its backward was compiled for one pass only (inductor's donated buffers), so the step is taken in that pass."""
    compiled = torch.compile(curved, backend=backend)
    assert (
        relative_error(trained(lambda m, x, t: compiled(m(x), t), lambda loss: loss), trained(plain, lambda z: z))
        < 1e-10
    )
    hook = npl.LossHook(curvature="hessian") if door == "hook" else lambda loss: loss
    loss = npl.newton_loss(compiled, curvature="hessian") if door == "wrapper" else compiled
    with pytest.warns(UserWarning, match=SPLIT) as caught:
        ours = trained(lambda model, x, t: loss(model(x), t), hook)
    assert len([w for w in caught if "newton_plugin" in str(w.message)]) == 1
    assert relative_error(ours, expected(npl.EmpiricalFisher())) <= 1e-10


def test_a_step_that_cannot_wait_says_what_to_do_about_a_single_pass(backend: str) -> None:
    compiled = torch.compile(curved, backend=backend)
    (x, t), *_ = BATCHES
    y = network()(x)

    def once(*_: Any) -> None:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")

    loss = compiled(y, t)
    loss.grad_fn.register_prehook(once)
    with pytest.raises(npl.NewtonPluginError, match=r"runs once \(donated buffers\).*Compile the network and not"):
        npl.LossHook(curvature="hessian", on_nonfinite="raise")(loss)


@pytest.mark.parametrize("curvature", EXACT, ids=str)
def test_a_wrapped_loss_inside_a_compiled_function_stays_out_of_it(backend: str, curvature: Any) -> None:
    """A graph break before it; the step, and the loss it differentiates, run eagerly."""
    wrapped = npl.newton_loss(curved, curvature=curvature)
    compiled = torch.compile(lambda model, x, t: 2 * wrapped(model(x), t) / 2, backend=backend)
    assert relative_error(trained(compiled, lambda loss: loss), expected(curvature)) <= 1e-10


def test_network_and_loss_in_one_region_are_refused(backend: str) -> None:
    compiled = torch.compile(plain, backend=backend)
    with pytest.raises(npl.NoBoundaryError, match=r"torch.compile has made one operation.*Compile the network and not"):
        trained(compiled, npl.LossHook())


def test_a_compiled_term_beside_others_is_reported(backend: str) -> None:
    compiled = torch.compile(plain, backend=backend)
    hook = npl.LossHook()
    with pytest.warns(UserWarning, match="leaves one boundary out: what torch.compile has made one operation"):
        trained(lambda model, x, t: plain(model, x, t) + compiled(model, x, t), hook)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_nothing_is_compiled_again_at_every_step(backend: str, curvature: Any) -> None:
    """After 14 steps there are as many graphs as after the second."""
    seen = []
    compiled: dict[int, Any] = {}

    def loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        forward = compiled.setdefault(id(model), torch.compile(model, backend=backend))
        seen.append(counters["stats"]["unique_graphs"])
        return curved(forward(x), t)

    trained(loss, npl.LossHook(curvature=curvature), BATCHES * 3 + BATCHES[:2])
    assert len(seen) == 14
    assert seen[2:] == [seen[2]] * 12
    assert seen[2] >= 1


class TestLightningModule:
    @staticmethod
    def module(through_forward: bool) -> Any:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
            y = self(batch[0]) if through_forward else self.model(batch[0])
            return curved(y, batch[1])

        return plain_module(pl, network(), lambda *_: torch.zeros(()), training_step=training_step)

    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_exact_with_one_warning_and_as_before_afterwards(self, backend: str, curvature: Any) -> None:
        reference = self.module(True)
        trainer(pl, NewtonLosses(curvature=curvature)).fit(reference, Batches(BATCHES))
        module = self.module(True)
        compiled = torch.compile(module, backend=backend)
        with pytest.warns(UserWarning, match="outside torch.compile") as caught:
            trainer(pl, NewtonLosses(curvature=curvature)).fit(compiled, Batches(BATCHES))
        assert len([w for w in caught if "NewtonLosses" in str(w.message)]) == 1
        ours, theirs = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (module, reference))
        assert relative_error(ours, theirs) <= 1e-10
        assert counters["stats"]["unique_graphs"] >= 1  # forward was compiled
        assert hasattr(module.training_step, "_torchdynamo_orig_callable")  # and the step is again, as before

    def test_a_compiled_network_inside_needs_no_warning(self, backend: str) -> None:
        reference, module = self.module(False), self.module(False)
        module.model = torch.compile(module.model, backend=backend)
        for each in (reference, module):
            trainer(pl, NewtonLosses()).fit(each, Batches(BATCHES))
        ours, theirs = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (module, reference))
        assert relative_error(ours, theirs) <= 1e-10
        assert counters["stats"]["unique_graphs"] >= 1

    def test_state_fits_the_model_with_and_without_the_compiler(self, backend: str) -> None:
        keys = []
        for compile_it in (False, True):
            module, newton = self.module(False), NewtonLosses()
            if compile_it:
                module.model = torch.compile(module.model, backend=backend)
            trainer(pl, newton).fit(module, Batches(BATCHES[:1]))
            keys.append(list(newton.state_dict()["hook"]["rules"]))
        assert keys[0] == keys[1] == ["model.2"]
