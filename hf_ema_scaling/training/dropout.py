"""Another dropout once pseudo-labels begin (slimIPL, arXiv 2010.11524, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig


class DropoutChange:
    """Sets every dropout probability of a model that is above 0, and sets it back.

    These are `p` of dropout modules, numbers of modules and of their configs with "dropout" in their names; not
    layerdrop, nor what is 0, for a change of strength should not begin to drop elsewhere. What a model did with the
    config as it was built stays as it is.

    Args:
        model: the student.
        probability: in [0, 1).

    Raises:
        ValueError: when the model has no dropout at all.
    """

    def __init__(self, model: nn.Module, probability: float) -> None:
        self.probability = probability
        self.changed = False
        self._in_modules: list[tuple[Any, str, float]] = []
        configs: dict[int, PretrainedConfig] = {}
        for module in model.modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                self._in_modules.append((module, "p", module.p))
            self._in_modules += _probabilities(module)
            _collect(getattr(module, "config", None), configs)
        self._in_configs = [place for config in configs.values() for place in _probabilities(config)]
        if not self._in_modules and not self._in_configs:
            raise ValueError(
                f"pl_dropout={probability} changes nothing: {type(model).__name__} has no dropout above 0; give the "
                "model one, or take pl_dropout out"
            )

    def set(self, changed: bool) -> None:
        """Whether the new probability holds."""
        if changed != self.changed:
            self._assign(self._in_modules + self._in_configs, changed)
            self.changed = changed

    @contextmanager
    def configs_as_given(self) -> Iterator[None]:
        """Inside, configs are as they were, so that a checkpoint's `config.json` is that of the model."""
        self._assign(self._in_configs, False)
        try:
            yield
        finally:
            self._assign(self._in_configs, self.changed)

    def _assign(self, places: list[tuple[Any, str, float]], changed: bool) -> None:
        for owner, name, before in places:
            setattr(owner, name, self.probability if changed else before)


def _probabilities(owner: Any) -> list[tuple[Any, str, float]]:
    found = vars(owner).items()
    return [(owner, name, x) for name, x in found if "dropout" in name and isinstance(x, float) and 0 < x < 1]


def _collect(config: Any, known: dict[int, PretrainedConfig]) -> None:
    if isinstance(config, PretrainedConfig) and id(config) not in known:
        known[id(config)] = config
        for value in list(vars(config).values()):
            _collect(value, known)
