"""The Hugging Face Trainer itself, on tiny models with random weights, against the surrogate written out in float64."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import gradients_and_hessians, live_samples, relative_error, step
from torch import Tensor, nn

import newton_plugin as npl

pytest.importorskip("transformers")
import transformers
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LabelSmoother

from newton_plugin_transformers import NewtonTrainerLoss

WORDS, LENGTH, DAMPING = 7, 6, 0.05
RULE = ("curvature", "structure", "power")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # transformers' own loading of a checkpoint
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    config = transformers.LlamaConfig(**sizes, vocab_size=WORDS, max_position_embeddings=LENGTH)
    return transformers.LlamaForCausalLM(config).double()


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **dropout, vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=3)
    return transformers.BertForSequenceClassification(config).double()


def texts(count: int = 12) -> list[dict[str, Tensor]]:
    """Sentences of different length; what is padded has the label -100, and one sentence is all padding."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    labels = words.clone()
    for k, row in enumerate(labels):
        row[1 + k % LENGTH :] = -100
    return [{"input_ids": w, "labels": v} for w, v in zip(words, labels, strict=True)]


def classified(count: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": text["input_ids"], "labels": text["input_ids"][0] % 3} for text in texts(count)]


class Collator:
    """Remembers the batches in the order in which the Trainer gets them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
        return dict(self.batches[-1])


def trainer(model: Any, newton: Any, data: list[Any], folder: Path, **options: Any) -> Any:
    """SGD with rate 1, no clipping: an optimizer step moves parameters by minus their gradient."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    callbacks = options.pop("callbacks", [])
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**settings, **options}),
        train_dataset=data,
        data_collator=Collator(),
        compute_loss_func=newton,
        callbacks=callbacks,
    )


def tokens(model: Any, batch: dict[str, Tensor], shift: bool) -> tuple[Tensor, Tensor]:
    """The rows of logits whose labels count, and these labels, by a loop."""
    logits, rows, labels = model(input_ids=batch["input_ids"]).logits, [], []
    if not shift:
        return logits, batch["labels"]
    for sentence, words in zip(logits, batch["labels"], strict=True):
        for place in range(LENGTH - 1):
            if words[place + 1] != -100:
                rows.append(sentence[place])
                labels.append(words[place + 1])
    return torch.stack(rows) if rows else logits[0, :0], torch.tensor(labels)


def surrogate_fit(model: Any, batches: list[Any], shift: bool, accumulate: int, smoothing: float, rule: Any) -> None:
    """What the Trainer should do, written out."""
    for k in range(0, len(batches), accumulate):
        group = [tokens(model, b, shift) for b in batches[k : k + accumulate]]
        items = sum(len(labels) for _, labels in group)
        total = torch.zeros((), dtype=torch.float64)
        for logits, labels in group:
            if len(labels) == 0:
                continue

            def loss_of(y: Tensor, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(y, labels, label_smoothing=smoothing)

            g, h = gradients_and_hessians(loss_of, logits)
            live = live_samples(g)  # a word that is certain has no gradient
            taken = step(g, h, *rule, DAMPING, live) * (len(labels) / live)
            total = total + npl.quadratic_surrogate(logits, logits.detach() - taken, "sum") / items
        model.zero_grad()
        total.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= p.grad


def worst(model: nn.Module, twin: nn.Module) -> float:
    """Over all parameters together: the true gradient of some (the bias of attention's keys) is zero."""
    vectors = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, twin)]
    return relative_error(*vectors)


@pytest.mark.parametrize("rule", [("fisher", "mean", 1), ("hessian", "mean", 1), ("fisher", "isotropic", 0.5)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_the_step_is_the_surrogates(kind: str, accumulate: int, rule: Any, tmp_path: Path) -> None:
    """Also the last, shorter group of an epoch: 4 batches in groups of 3."""
    shift = kind == "language model"
    model, data = (language_model(), texts()) if shift else (classifier(), classified())
    twin = copy.deepcopy(model)
    newton = NewtonTrainerLoss(shift_labels=shift, **dict(zip(RULE, rule, strict=True)), damping=DAMPING)
    fit = trainer(model, newton, data, tmp_path, gradient_accumulation_steps=accumulate)
    fit.train()
    surrogate_fit(twin, fit.data_collator.batches, shift, accumulate, 0.0, rule)
    assert worst(model, twin) < 1e-10
    assert worst(model, language_model() if shift else classifier()) > 1e-3


@pytest.mark.parametrize("shift", [True, False])
def test_label_smoothing(shift: bool, tmp_path: Path) -> None:
    model, data = (language_model(), texts()) if shift else (classifier(), classified())
    twin = copy.deepcopy(model)
    newton = NewtonTrainerLoss(shift_labels=shift, damping=DAMPING, label_smoothing=0.2)
    fit = trainer(model, newton, data, tmp_path, gradient_accumulation_steps=2)
    fit.train()
    surrogate_fit(twin, fit.data_collator.batches, shift, 2, 0.2, ("fisher", "mean", 1))
    assert worst(model, twin) < 1e-10


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("items", [None, 40])
def test_the_value_is_the_trainers_own(items: int | None, smoothing: float) -> None:
    model = language_model()
    batch = Collator()(texts(3))
    count = None if items is None else torch.tensor(items)
    outputs = model(input_ids=batch["input_ids"])
    ours = NewtonTrainerLoss(shift_labels=True, label_smoothing=smoothing)(outputs, batch["labels"], count)
    if smoothing:
        theirs = LabelSmoother(smoothing)(outputs, batch["labels"], shift_labels=True, num_items_in_batch=count)
    else:
        more = {} if count is None else {"num_items_in_batch": count}
        theirs = model(**batch, **more).loss.double()  # transformers computes it in float32
    assert relative_error(ours.detach(), theirs.detach()) < 1e-6


def test_padding_changes_nothing() -> None:
    """The same tokens with more padding behind them: the same loss and gradients."""
    model, batch = language_model(), Collator()(texts(4))
    batch["labels"][:, 4:] = -100
    short = {k: v[:, :4] for k, v in batch.items()}
    grads = []
    for b in (batch, short):
        model.zero_grad()
        NewtonTrainerLoss(shift_labels=True)(model(input_ids=b["input_ids"]), b["labels"], 12).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert relative_error(*map(nn.utils.parameters_to_vector, grads)) < 1e-12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision_is_the_plain_loop(accumulate: int, tmp_path: Path) -> None:
    model = classifier().float()
    twin = copy.deepcopy(model)
    fit = trainer(model, NewtonTrainerLoss(), classified(), tmp_path, gradient_accumulation_steps=accumulate, bf16=True)
    fit.train()
    batches, newton = fit.data_collator.batches, NewtonTrainerLoss()
    twin.train()
    for k in range(0, len(batches), accumulate):
        twin.zero_grad()
        for batch in batches[k : k + accumulate]:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = twin(input_ids=batch["input_ids"])
            loss = newton({"logits": outputs.logits.float()}, batch["labels"], 3 * accumulate)
            loss.backward()
        with torch.no_grad():
            for p in twin.parameters():
                if p.grad is not None:
                    p -= p.grad
    assert worst(model, twin) < 1e-5


def ranking(scores: Tensor, ranks: Tensor) -> Tensor:
    return (scores.softmax(-1) - F.one_hot(ranks[:, 0], 3)).square().sum(-1).mean()


def test_a_loss_of_ones_own_gets_logits_and_labels_as_they_are(tmp_path: Path) -> None:
    """Labels (N, k) count k times each, as the Trainer counts them: the weight of a batch is its share of samples."""
    data = [{"input_ids": t["input_ids"], "labels": t["input_ids"][:2] % 3} for t in texts()]
    model = classifier()
    twin = copy.deepcopy(model)
    fit = trainer(model, NewtonTrainerLoss(ranking, damping=0.1), data, tmp_path, gradient_accumulation_steps=4)
    fit.train()
    for batch in fit.data_collator.batches:
        hook = npl.LossHook(damping=0.1)
        (hook(ranking(twin(input_ids=batch["input_ids"]).logits, batch["labels"])) / 4).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0 if p.grad is None else p.grad
    assert worst(model, twin) < 1e-10


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(logits, labels, reduction="none")
    return ((-torch.expm1(-nll)).square() * nll).mean()


def test_a_loss_of_ones_own_for_each_token(tmp_path: Path) -> None:
    model = language_model()
    twin = copy.deepcopy(model)
    newton = NewtonTrainerLoss(focal, per_label=True, shift_labels=True, damping=DAMPING)
    fit = trainer(model, newton, texts(6), tmp_path)
    fit.train()
    for batch in fit.data_collator.batches:
        logits, labels = tokens(twin, batch, shift=True)
        twin.zero_grad()
        npl.newton_loss(focal, damping=DAMPING)(logits, labels).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0 if p.grad is None else p.grad
    assert worst(model, twin) < 1e-10


def test_evaluation_is_plain(tmp_path: Path) -> None:
    newton = NewtonTrainerLoss()
    fit = trainer(classifier(), newton, classified(), tmp_path)
    assert fit.evaluate(classified(6))["eval_loss"] > 0
    assert newton.diagnostics() == {}


def test_logs_and_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    newton = NewtonTrainerLoss()
    callbacks = [newton, TensorBoardCallback()]
    logs = {"logging_strategy": "steps", "logging_steps": 2, "logging_dir": str(tmp_path / "tb")}
    if "logging_dir" not in transformers.TrainingArguments.__dataclass_fields__:
        logs.pop("logging_dir")
    fit = trainer(classifier(), newton, classified(), tmp_path, callbacks=callbacks, **logs)
    fit.train()
    rows = [row for row in fit.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    names = {"gradient_norm", "step_norm", "eig_min", "eig_max", "damping", "fallbacks"}
    assert all({f"newton/{name}" for name in names} <= set(row) for row in rows)
    assert rows[-1]["newton/step_norm"] == newton.diagnostics()["step_norm"]
    (file,) = tmp_path.rglob("events.out*")
    seen = event_accumulator.EventAccumulator(str(file.parent)).Reload()
    assert any(tag.endswith("newton/step_norm") for tag in seen.Tags()["scalars"])


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    """4 steps at once, and 2 + 2 from a checkpoint: the running curvature of damping="auto" goes on."""
    options = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    whole = classifier()
    newton = NewtonTrainerLoss()
    trainer(whole, newton, classified(), tmp_path, callbacks=[newton], **options).train()
    halves, later = classifier(), NewtonTrainerLoss()
    fit = trainer(halves, later, classified(), tmp_path, callbacks=[later], **options)
    fit.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, whole.parameters(), halves.parameters()))
    assert later.diagnostics() == newton.diagnostics()


def test_resuming_without_the_file_says_so(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(classifier(), None, classified(), tmp_path, **options).train()
    newton = NewtonTrainerLoss()
    fit = trainer(classifier(), newton, classified(), tmp_path, callbacks=[newton], **options)
    with pytest.warns(UserWarning, match="resumes without its running curvature: there is no .*newton_losses.pt"):
        fit.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_from_start_to_stop_the_rest_is_plain(accumulate: int, tmp_path: Path) -> None:
    """Optimizer steps 1 and 2 are Newton steps, 0 and 3 are plain; counted by a hook that is not there otherwise."""
    newton = NewtonTrainerLoss(start_step=1, stop_step=3)
    hook, taken = newton.hook, []

    def hooked(loss: Tensor) -> Tensor:
        taken.append(fit.state.global_step)
        return hook(loss)

    newton.hook = hooked  # type: ignore[assignment]
    hooked.state_dict, hooked.diagnostics = hook.state_dict, hook.diagnostics  # type: ignore[attr-defined]
    hooked.set_optimizer = hook.set_optimizer  # type: ignore[attr-defined]
    fit = trainer(
        classifier(), newton, classified(), tmp_path, callbacks=[newton], max_steps=4,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    fit.train()
    assert taken == [1] * accumulate + [2] * accumulate


def test_switched_off_training_is_plain_and_the_state_is_kept(tmp_path: Path) -> None:
    plain, model = classifier(), classifier()
    trainer(plain, NewtonTrainerLoss(enabled=False), classified(), tmp_path).train()
    newton = NewtonTrainerLoss()
    newton({"logits": torch.randn(6, 3).requires_grad_()}, torch.arange(6) % 3).backward()
    before = copy.deepcopy(newton.state_dict())
    newton.enabled = False
    trainer(model, newton, classified(), tmp_path).train()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert repr(newton.state_dict()) == repr(before)
    expected = classifier()
    trainer(
        expected, lambda o, labels, num_items_in_batch: F.cross_entropy(o["logits"], labels), classified(), tmp_path
    ).train()
    assert worst(expected, plain) < 1e-12


def test_steps_are_asked_of_the_trainer() -> None:
    newton = NewtonTrainerLoss(start_step=2)
    with pytest.raises(npl.ArgumentError, match=r"start_step=2, stop_step=None: .*callbacks=\[newton\]"):
        newton({"logits": torch.randn(6, 3).requires_grad_()}, torch.arange(6) % 3)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, ""),
        ({"damping": 0.1, "start_step": 3, "log": False}, "start_step=3, damping=0.1, log=False"),
        ({"loss_fn": F.mse_loss, "per_label": True}, "loss_fn=.*mse_loss.*, per_label=True"),
        ({"enabled": False, "shift_labels": True}, "shift_labels=True, enabled=False"),
    ],
    ids=["nothing", "three", "a loss", "off"],
)
def test_repr_shows_what_differs_from_the_defaults(arguments: Any, shown: str) -> None:
    assert re.fullmatch(rf"NewtonTrainerLoss\({shown}\)", repr(NewtonTrainerLoss(**arguments)))


def test_the_former_name_works_and_says_so_once() -> None:
    """In a process of its own: elsewhere somebody may have asked before."""
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            from newton_plugin_transformers import NewtonLosses
            import newton_plugin_transformers
            assert newton_plugin_transformers.NewtonLosses is NewtonLosses
        from newton_plugin_transformers import NewtonTrainerLoss
        assert NewtonLosses is NewtonTrainerLoss
        ours = [w for w in said if issubclass(w.category, DeprecationWarning) and "NewtonTrainerLoss" in str(w.message)]
        assert len(ours) == 1, said
        assert ours[0].filename == "<string>", ours[0].filename
        assert not hasattr(newton_plugin_transformers, "NewtonLoss")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_another_model_begins_anew(tmp_path: Path) -> None:
    newton, alone = NewtonTrainerLoss(), NewtonTrainerLoss()
    trainer(classifier(), newton, classified(), tmp_path, callbacks=[newton]).train()
    trainer(classifier(), newton, classified(6), tmp_path, callbacks=[newton]).train()
    trainer(classifier(), alone, classified(6), tmp_path, callbacks=[alone]).train()
    assert newton.diagnostics() == alone.diagnostics()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_copies_go_on_from_the_same_state(copied: Any) -> None:
    y, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.arange(6) % 3
    newton = NewtonTrainerLoss()
    newton({"logits": y}, labels).backward()
    other = copied(newton)
    y.grad = None
    newton({"logits": 2 * y}, labels).backward()
    first, y.grad = y.grad, None
    other({"logits": 2 * y}, labels).backward()
    assert torch.equal(first, y.grad)


def test_a_batch_without_a_label_has_loss_and_gradient_zero() -> None:
    y = torch.randn(2, 4, 3, requires_grad=True)
    loss = NewtonTrainerLoss(shift_labels=True)({"logits": y}, torch.full((2, 4), -100), 5)
    loss.backward()
    assert loss.item() == 0
    assert not y.grad.any()


LOGITS = {"logits": torch.randn(2, 4, 3, requires_grad=True)}


@pytest.mark.parametrize(
    ("make", "outputs", "labels", "said"),
    [
        ({"shift_labels": None}, LOGITS, torch.zeros(2, 4).long(), "shift_labels must be given for a loss at each"),
        ({"shift_labels": True}, LOGITS, torch.zeros(2, 3).long(), "a loss for each label needs one integer for each"),
        ({}, LOGITS, torch.zeros(2, 4), r"needs one integer .* of shape \(2, 4\), torch.float32"),
        ({}, LOGITS, None, "labels must be in the batch"),
        ({}, LOGITS, [1, 2], "labels must be a torch.Tensor; got list"),
        ({}, {"start_logits": 1}, torch.zeros(2), "outputs must hold logits .* with the keys 'start_logits'"),
        ({}, (), torch.zeros(2), "outputs must hold logits .* got tuple"),
    ],
)
def test_what_does_not_fit(make: Any, outputs: Any, labels: Any, said: str) -> None:
    with pytest.raises(npl.NewtonPluginError, match=said):
        NewtonTrainerLoss(**make)(outputs, labels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]; got 1.5"),
        ({"label_smoothing": "some"}, "label_smoothing must be a number; got 'some'"),
        ({"label_smoothing": 0.1, "loss_fn": F.cross_entropy}, "label_smoothing belongs to the default loss"),
        ({"loss_fn": 3}, "loss_fn must be callable, or None; got int"),
        ({"shift_labels": "yes"}, "shift_labels must be True or False; got 'yes'"),
        ({"per_label": 1}, "per_label must be True or False; got 1"),
        ({"per_label": False}, "the default loss needs per_label=True"),
        ({"loss_fn": F.cross_entropy, "shift_labels": True}, "shift_labels=True needs per_label=True"),
        ({"log": 1}, "log must be True or False; got 1"),
        ({"enabled": 1}, "enabled must be True or False; got 1"),
        ({"start_step": -1}, "start_step must be 0 .* or positive; got -1"),
        ({"start_step": 4, "stop_step": 4}, "stop_step must be larger than start_step=4; got 4"),
        ({"stop_step": 2.5}, "stop_step must be a number of optimizer steps; got 2.5 of type float"),
        ({"damping": -1}, "damping must be positive and finite; got -1"),
    ],
)
def test_wrong_arguments(arguments: Any, said: str) -> None:
    with pytest.raises(npl.NewtonPluginError, match=said):
        NewtonTrainerLoss(**arguments)
