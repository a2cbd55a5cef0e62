"""``python -m newton_plugin_lightning compare``: the comparison of what a configuration of ``fit`` trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from newton_plugin import ArgumentError
from newton_plugin_lightning._compare.arms import NAMED, YOURS, Arm, arms_from_words, same_rule, with_plain
from newton_plugin_lightning._compare.comparison import ARMS, RATES, SEEDS, carry_out
from newton_plugin_lightning._compare.fit_config import FitConfig, read_config
from newton_plugin_lightning._compare.plan import check_plan, rate_word

__all__ = ["command"]

_NAME = "python -m newton_plugin_lightning compare"
_ABOUT = """
Trains what a configuration of `fit` trains, plain and with Newton Losses, at several learning rates, paired by seed,
and says whether Newton Losses help. All other arguments are those of `fit`: --config mine.yaml --trainer.max_epochs=20.
Interrupted, the same command goes on where it was. How to read what it prints: docs/compare.md.
"""


def command(args: Sequence[str]) -> None:
    """Run the comparison that the arguments name and print its table and verdict."""
    given, rest = _parser().parse_known_args(args)
    read = read_config(rest, given.keep_checkpoints)
    notes = [f"The callback {name} is taken out of all runs." for name in read.left_out]
    arms, told = _arms(given.arms, read.yours)
    plan = check_plan(given.metric, given.mode, given.seeds, arms, given.rates)
    task = FitConfig(rest, given.keep_checkpoints)
    notes += told
    print(f"{len(plan.runs())} runs: {', '.join(arm.name for arm in plan.arms)}, each at", end=" ")
    print(f"{', '.join(map(rate_word, plan.rates))} of your learning rate, {len(plan.seeds)} seeds; in {given.out}")
    for note in notes:
        print(note)
    made = carry_out(task, plan, read.identity, given.out, given.workers, given.keep_checkpoints, notes)
    print(f"\n{made.report}")


def _arms(words: Sequence[str] | None, yours: Sequence[dict[str, object]]) -> tuple[list[Arm], list[str]]:
    """The arms that are asked for, with the configuration's own callback as one more unless it is there already."""
    arms = arms_from_words(words or ARMS)
    if not yours:
        if YOURS in arms:
            raise ArgumentError("arms: 'yours' is the configuration's NewtonLosses, and it has none. Leave it out.")
        return arms, []
    if len(yours) == 1:
        named = [arm for arm in NAMED.values() if arm.kind == "newton" and same_rule(arm.arguments, yours[0])]
        if named and YOURS not in arms:
            return with_plain([*arms, *(n for n in named if n not in arms)]), [
                f"The NewtonLosses in your configuration is the arm {named[0].name!r}; other arms go without it."
            ]
    arms = arms if YOURS in arms else [*arms, YOURS]
    return arms, ["The NewtonLosses in your configuration is the arm 'yours'; other arms go without it."]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(_NAME, description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--metric", required=True, help="a name that the module logs; its value after fit counts")
    parser.add_argument("--mode", required=True, choices=["max", "min"], help="whether larger or smaller is better")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs, the table and the picture")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
    parser.add_argument(
        "--arms",
        nargs="+",
        help=f"of {', '.join([*NAMED, YOURS.name])}, or name:argument=value,... (default: {' '.join(ARMS)}, and yours)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=lambda text: float(Fraction(text)),
        default=RATES,
        help="factors of your learning rate at which every arm is tried (default: 1/3 1 3)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--keep_checkpoints", action="store_true", help="turn checkpoints on, in OUT/checkpoints")
    return parser
