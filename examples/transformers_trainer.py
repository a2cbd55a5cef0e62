"""Newton Losses in the Hugging Face Trainer: ``compute_loss_func``.

A tiny BERT with random weights (nothing is downloaded) reads a list of pictures of digits as a text, one word for each
picture, and learns to rank them from nothing but their order. A language model or a classifier needs no function of its
own: ``NewtonTrainerLoss()`` is their cross-entropy.

    python -m examples.transformers_trainer
"""

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

from examples.digit_lists import DigitLists
from examples.digit_scorer import LENGTH, ranking_loss
from newton_plugin_transformers import NewtonTrainerLoss


def lists(part: Any, count: int) -> list[dict[str, Tensor]]:
    """Pictures (n, 64) as the embeddings of n words, and the ranks of their digits."""
    images, ranks = next(iter(DigitLists(part, LENGTH, batch_size=count, batches=1, seed=0)))
    return [{"inputs_embeds": i, "labels": r} for i, r in zip(images, ranks, strict=True)]


def loss_fn(logits: Tensor, ranks: Tensor) -> Tensor:
    """(B, n, 1) scores as a token classifier gives them, (B, n) ranks."""
    return ranking_loss(logits.squeeze(-1), ranks)


def ranked_right(found: Any) -> dict[str, float]:
    ranks = found.predictions.squeeze(-1).argsort(-1).argsort(-1)
    return {"full": float((ranks == found.label_ids).all(-1).mean())}


def main(steps: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=1, max_position_embeddings=LENGTH, num_labels=1, pad_token_id=None)
    newton = NewtonTrainerLoss(loss_fn)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            BertForTokenClassification(config),
            arguments,
            train_dataset=lists("train", 4000),
            eval_dataset=lists("test", 500),
            compute_loss_func=newton,  # the step
            callbacks=[newton],  # its numbers in the logs, its state in checkpoints
            compute_metrics=ranked_right,
        )
        trainer.train()
        print(f"{trainer.evaluate()['eval_full']:.1%} of 500 test lists ranked fully right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
