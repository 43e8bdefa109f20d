"""The mean of several networks' weights (a uniform soup: Wortsman et al. 2022; Polyak averaging, if of one run).

Statistics of norms are averaged with the rest, and are wrong then: activations of mean weights are not the mean of
activations. They are to be estimated anew with the mean weights held still (norm/population.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SOUP = "soup"  # in a checkpoint of averaged weights: its members, and what they scored


class SoupError(ValueError):
    """States that are not of one network."""


def mean_of(states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The mean of each tensor, taken in float64 and rounded once; whole numbers are those of the first.

    states: by a name for messages; taken one after another, so that two are in memory at a time. Raises SoupError
    where names or shapes differ, or a value is no number.
    """
    first_name, first = "", dict[str, Tensor]()
    sums: dict[str, Tensor] = {}
    count = 0
    for name, state in states:
        if count:
            _check(name, state, first_name, first)
        else:
            first_name, first = name, dict(state)
            sums = {key: torch.zeros_like(v, dtype=torch.float64) for key, v in state.items() if v.is_floating_point()}
        for key in sums:
            if not torch.isfinite(state[key]).all():
                raise SoupError(f"{name}: {key} holds values that are no numbers; leave it out")
            sums[key] += state[key]
        count += 1
    if not count:
        raise SoupError("there is nothing to average; give at least one state")
    return {key: (sums[key] / count).to(value.dtype) if key in sums else value for key, value in first.items()}


def _check(name: str, state: Mapping[str, Tensor], first_name: str, first: Mapping[str, Tensor]) -> None:
    if unlike := sorted(state.keys() ^ first.keys()):
        raise SoupError(
            f"{name} is of another network than {first_name}: {len(unlike)} tensors are in one of them alone, "
            f"{unlike[0]} the first; average checkpoints of one network"
        )
    for key, value in first.items():
        if state[key].shape != value.shape:
            raise SoupError(
                f"{name} is of another network than {first_name}: {key} is {tuple(state[key].shape)} in it, and "
                f"{tuple(value.shape)} in the other; average checkpoints of one network"
            )
