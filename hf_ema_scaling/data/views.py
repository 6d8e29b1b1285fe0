"""Views of an input: what an augmentation is given and may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from hf_ema_scaling.data.seeding import spread_seed


class Augmentation(Protocol):
    """Changes the student's inputs, each row by a seed of its own; a plain function will do.

    What a row becomes must depend on its seed, content and length only, so that it is the same at every batch size:
    not on its neighbours, the padding, the device or the global random state.
    """

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int], /) -> Mapping[str, Tensor]:
        """The inputs that change, with as many rows; those that are not returned stay as they are.

        Args:
            inputs: padded inputs of the student without `labels`, first dimension rows, on its device; not to be
                changed in place.
            seeds: one per row, of any size; `spread_seed` makes them fit for a torch generator.
        """
        ...


class Chain:
    """Several augmentations one after another, each with random numbers of its own.

    The first has the seeds as they are, so it does what it would do alone.

    Args:
        *augmentations: in the order in which they are applied.

    Attributes:
        changes_length: whether one of them does, see `changes_length`.

    Raises:
        ValueError: without an augmentation.
    """

    def __init__(self, *augmentations: Augmentation) -> None:
        if not augmentations:
            raise ValueError("a chain needs an augmentation")
        self.augmentations = augmentations
        self.changes_length = any(map(changes_length, augmentations))

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> Mapping[str, Tensor]:
        """The inputs as all of them together change them."""
        for augmentation in self.augmentations:
            inputs = {**inputs, **augmentation(inputs, seeds)}
            seeds = [spread_seed(seed) for seed in seeds]
        return inputs


def changes_length(augmentation: Augmentation) -> bool:
    """Whether an augmentation says, by an attribute of this name, that it moves, drops or adds tokens of a row.

    Such a view does not go with labels by token.
    """
    return bool(getattr(augmentation, "changes_length", False))
