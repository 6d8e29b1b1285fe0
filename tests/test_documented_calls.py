"""Every call of a public constructor that README, guides and docstrings show is one that the library accepts.

That all code of README and guides runs is tested in `tests/documents`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_ema_scaling
from hf_ema_scaling.scaling import BatchSchedule, ReferenceClock

ROOT = Path(hf_ema_scaling.__file__).parents[1]
PUBLIC = {name: getattr(hf_ema_scaling, name) for name in hf_ema_scaling.__all__}
LITERAL = (hf_ema_scaling.EMACallback, BatchSchedule, ReferenceClock)


def python_blocks() -> Iterator[tuple[str, str]]:
    guides = sorted((ROOT / "recipes" / "guides").glob("*.md"))
    places = [ROOT / "README.md", *guides, *sorted((ROOT / "hf_ema_scaling").rglob("*.py"))]
    for path in places:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            yield str(path.relative_to(ROOT)), textwrap.dedent(block)


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for place, block in python_blocks():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUBLIC:
                yield place, node.func.id, node


CALLS = list(calls())


def test_there_are_such_calls() -> None:
    assert len(CALLS) >= 5 and {"EMACallback", "EMATrainer"} <= {name for _, name, _ in CALLS}


@pytest.mark.parametrize(("place", "name", "call"), CALLS, ids=[f"{p}:{n}:{c.lineno}" for p, n, c in CALLS])
def test_its_arguments_exist_and_literal_ones_are_accepted(place: str, name: str, call: ast.Call) -> None:
    kind = PUBLIC[name]
    words = {word.arg: word.value for word in call.keywords if word.arg is not None}
    inspect.signature(kind).bind(*call.args, **words)
    accepted = {p for base in getattr(kind, "__mro__", ()) for p in inspect.signature(base.__init__).parameters}
    if inspect.isclass(kind):  # also where a constructor passes keywords on to its base
        assert words.keys() <= accepted, (place, name)
    values = [*call.args, *words.values()]
    if kind in LITERAL and all(isinstance(value, ast.Constant) for value in values):
        kind(*map(ast.literal_eval, call.args), **{key: ast.literal_eval(value) for key, value in words.items()})
