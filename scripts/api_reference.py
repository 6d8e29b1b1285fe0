"""The API reference in `recipes/guides/api.md`, written from the docstrings of the public names.

    python scripts/api_reference.py            # writes it
    python scripts/api_reference.py --check    # exit code 1 where the file is not what would be written

Every name in `hf_ema_scaling.__all__` has its module, signature and docstring; a class has its public methods too,
with the first paragraph of each. What a class takes from transformers or torch is left out, so that the page does not
depend on their versions.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

import hf_ema_scaling

PACKAGE = hf_ema_scaling.__name__
PAGE = Path(__file__).parents[1] / "recipes" / "guides" / "api.md"
FLOORS = {
    "scaling": "Arithmetic of batches and momenta",
    "ema": "The average and its teacher",
    "labels": "Labels and filters",
    "data": "Order of the data, views",
    "training": "Trainers and the callback",
}
"""Packages by floor, as headings."""
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
ITEM = re.compile(r"    ([\w*][\w*., ]*): (.*)")
HEAD = f"""# API reference

Written by `python scripts/api_reference.py` from the docstrings; a test compares. All names are imported from
`{PACKAGE}`; the module named with each is where it is defined.
"""


def public_names() -> list[str]:
    """What the package exports, without its version."""
    return [name for name in hf_ema_scaling.__all__ if not name.startswith("__")]


def floor_of(member: Any) -> str:
    """Name of the package that a public class or function is in."""
    return str(member.__module__).split(".")[1]


def annotation(found: Any) -> str:
    """A type as it stands in the source; nothing where there is none."""
    if found is inspect.Signature.empty:
        return ""
    return found if isinstance(found, str) else getattr(found, "__name__", str(found))


def default(value: Any) -> str:
    """A default value; functions by name, and made values as `...`."""
    if inspect.isfunction(value):
        return value.__name__.lstrip("_")
    text = repr(value)
    return "..." if text.startswith("<") else text


def parameter(found: inspect.Parameter) -> str:
    """A parameter as it stands in a signature."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(found.kind, "")
    text = stars + found.name
    kind = annotation(found.annotation)
    text += f": {kind}" if kind else ""
    if found.default is inspect.Parameter.empty:
        return text
    return f"{text} = {default(found.default)}" if kind else f"{text}={default(found.default)}"


def parameters(function: Any, own: frozenset[str] | None = None) -> list[str]:
    """Parameters of a callable without `self`; only those of some names where `own` says so."""
    found: list[str] = []
    star = False
    for each in inspect.signature(function).parameters.values():
        if each.name in ("self", "cls") or (own is not None and each.name not in own):
            continue
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            found.append("*")
        star = star or each.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        found.append(parameter(each))
    return found


def call(name: str, arguments: list[str], result: Any = inspect.Signature.empty) -> str:
    """A call with its types, on lines of its own where one line is too short."""
    arrow = annotation(result)
    arrow = f" -> {arrow}" if arrow not in ("", "None") else ""
    line = f"{name}({', '.join(arguments)}){arrow}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){arrow}"


def signature(name: str, member: Any) -> str:
    """A class or function as it is called; nothing for protocols, which nobody calls."""
    if not inspect.isclass(member):
        return call(name, parameters(member), inspect.signature(member).return_annotation)
    if getattr(member, "_is_protocol", False):
        return ""
    if not dataclasses.is_dataclass(member):
        return call(name, parameters(member))
    stranger = any(dataclasses.is_dataclass(base) and not ours(base) for base in member.__mro__)
    return call(name, parameters(member, own_fields(member) if stranger else None))


def ours(kind: type) -> bool:
    """Whether a class is of this package."""
    return kind.__module__.split(".")[0] == PACKAGE


def public_bases(kind: type) -> list[type]:
    """Bases that have sections of their own."""
    public = [getattr(hf_ema_scaling, name) for name in public_names()]
    return [base for base in kind.__mro__[1:] if base in public and not getattr(base, "_is_protocol", False)]


def own_bases(kind: type) -> list[type]:
    """The class and its bases in this package, without those that have sections of their own."""
    return [base for base in kind.__mro__ if ours(base) and base not in public_bases(kind)]


def own_fields(kind: type) -> frozenset[str]:
    """Fields that a data class declares, or a base of it that has no section of its own."""
    return frozenset(name for base in own_bases(kind) for name in inspect.get_annotations(base))


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    lines, out, section = docstring.splitlines(), [], ""
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            out += [f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = ""
            out += ["", line] if out and out[-1] else [line]
        elif section and (item := ITEM.fullmatch(line)) and section != "Returns":
            out.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("    "):
            # The rest of an item, or free text.
            inside = line.removeprefix("    ")
            out.append(f"  {inside.lstrip()}" if inside.startswith("    ") else inside)
        else:
            out.append(line)
    return "\n".join(out).strip()


def first_paragraph(docstring: str) -> str:
    """Until the first blank line, on one line."""
    return " ".join(docstring.split("\n\n", 1)[0].split())


def of_strangers(kind: type, name: str) -> bool:
    """Whether a name of a class comes from, or overrides one of, another package."""
    return any(name in vars(base) for base in kind.__mro__ if not ours(base))


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of its bases that have no sections of their own."""
    seen = set()
    for base in own_bases(kind):
        for name, member in vars(base).items():
            inner = getattr(member, "__func__", member)
            method = isinstance(inner, property) or inspect.isfunction(inner)
            if name.startswith("_") or name in seen or not method or of_strangers(kind, name):
                continue
            seen.add(name)
            yield name, inner


def method_line(name: str, member: Any) -> str:
    """One line about a method or property."""
    text = first_paragraph(inspect.getdoc(member) or "")
    if isinstance(member, property):
        return f"- `{name}`: {text}"
    words = [re.split(r"[:=]", each)[0].strip() for each in parameters(member)]
    return f"- `{name}({', '.join(words)})`: {text}"


def written_below(kind: type) -> dict[str, str]:
    """The strings that stand below the fields of a class, by field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    return {
        one.target.id: " ".join(two.value.value.split())
        for one, two in pairwise(body)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if isinstance(two, ast.Expr) and isinstance(two.value, ast.Constant) and isinstance(two.value.value, str)
    }


def field_lines(kind: type) -> Iterator[str]:
    """Fields with their texts, of a data class that documents them one by one and not in its docstring."""
    below = written_below(kind)
    # Not `field.type`: HfArgumentParser writes other types into it.
    types = {name: found for base in reversed(kind.__mro__) for name, found in inspect.get_annotations(base).items()}
    for each in dataclasses.fields(kind):
        text = each.metadata.get("help") or below.get(each.name)
        if not text or each.name not in own_fields(kind) or f"{each.name}:" in (kind.__doc__ or ""):
            continue
        unset = each.default is dataclasses.MISSING
        stated = "" if unset else f", default `{default(each.default)}`"
        yield f"- `{each.name}` (`{annotation(types[each.name])}`{stated}): {text}"


def entry(name: str) -> str:
    """The section about one public name."""
    member = getattr(hf_ema_scaling, name)
    docstring = inspect.getdoc(member) or ""
    parts = [f"### `{name}`", f"`{member.__module__}.{member.__qualname__}`"]
    if found := signature(name, member):
        parts.append(f"```text\n{found}\n```")
    # Its code needs a model and data: the tests know them by this name.
    parts.append(markdown(docstring).replace("```python", f"<!-- needs: {name.lower()} -->\n```python"))
    if inspect.isclass(member):
        for base in public_bases(member):
            parts.append(f"It has what [`{base.__name__}`](#{base.__name__.lower()}) has, too.")
        fields = list(field_lines(member)) if dataclasses.is_dataclass(member) else []
        if fields:
            parts.append("**Fields**\n\n" + "\n".join(fields))
        methods = [method_line(name, each) for name, each in members(member)]
        if methods:
            parts.append("**Methods**\n\n" + "\n".join(methods))
    return "\n\n".join(parts)


def reference() -> str:
    """The whole page."""
    names = public_names()
    by_floor: dict[str, list[str]] = {floor: [] for floor in FLOORS}
    for name in names:
        by_floor[floor_of(getattr(hf_ema_scaling, name))].append(name)
    parts = [HEAD.strip()]
    for floor, heading in FLOORS.items():
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in by_floor[floor])
        parts += [f"## {heading}", links]
        parts += [entry(name) for name in by_floor[floor]]
    return "\n\n".join(parts) + "\n"


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare with the file in place of writing it.")] = False,
) -> None:
    """Write the API reference."""
    text = reference()
    if not check:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        typer.echo(str(PAGE))
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        typer.secho(f"{PAGE} is out of date: run python scripts/api_reference.py", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
