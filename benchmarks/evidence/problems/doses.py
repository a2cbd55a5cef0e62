"""How much may be wrong? Problems of other tables with 0, 10, 30 and 50 % of their training targets corrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from benchmarks.evidence.problems.classification import Classification
from benchmarks.evidence.problems.paths import Paths
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.problems.ranking import Ranking
from benchmarks.evidence.problems.relevance import Relevance

__all__ = ["DOSES", "dose_problems"]

DOSES = (0, 10, 30, 50)
"""Per cent."""


def dose_problems(every: Mapping[str, Problem]) -> Iterator[Ranking | Classification | Paths | Relevance]:
    """Table ``dose``: all that is not named here is as in the problem that is varied.

    * lists: ``wrong_lists``; the order of a wrong one is random, drawn anew with each batch.
    * labels: ``wrong_labels``; a share is drawn anew from all ten digits (a tenth of it is right by chance), once for
      each run. ``labels_neighbour``: the label becomes the digit's neighbour, which is structured noise. At 50 % such
      labels tell the pairs of digits apart and not the two of a pair.
    * paths: ``fenchel_young_3``; a wrong one is another training map's, once for each run.
    * grades: ``ndcg_10``; the grades of a wrong list are in a random order, drawn anew with each batch.

    Args:
        every: the problems of the scale cpu by name.
    """
    lists, labels = every["wrong_lists"], every["wrong_labels"]
    paths, ndcg = every["fenchel_young_3"], every["ndcg_10"]
    assert isinstance(lists, Ranking)
    assert isinstance(labels, Classification)
    assert isinstance(paths, Paths)
    assert isinstance(ndcg, Relevance)
    for dose in DOSES:
        share, name = dose / 100, f"{dose:02d}"
        varied = {"table": "dose", "name": f"lists_{name}"}
        yield replace(lists, title=f"NeuralSort .1, n = 5, {dose} % wrong", wrong=share, **varied)
        varied["name"] = f"labels_{name}"
        yield replace(labels, title=f"classes, {dose} % random labels", random_labels=share, **varied)
        varied["name"] = f"paths_{name}"
        yield replace(paths, title=f"Fenchel-Young, 3 samples, {dose} % wrong", wrong=share, **varied)
        varied["name"] = f"grades_{name}"
        yield replace(ndcg, title=f"NDCG@5 by NeuralSort, {dose} % wrong", wrong=share, **varied)
    for dose in DOSES[1:]:
        yield replace(
            labels,
            name=f"labels_neighbour_{dose}",
            title=f"classes, {dose} % neighbours' labels",
            random_labels=dose / 100,
            to_neighbours=True,
            table="dose",
        )
