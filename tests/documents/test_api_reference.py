"""The API reference is what its script writes, and the script notices what is missing or wrong."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer
from documents.blocks import GUIDES, ROOT

import hf_ema_scaling


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "scripts" / "api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_the_generated_one(script: ModuleType) -> None:
    assert script.PAGE == GUIDES / "api.md"
    script.main(check=True)


def test_another_page_is_an_error(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "api.md"
    monkeypatch.setattr(script, "PAGE", page)
    for text in (None, "other\n"):
        if text:
            page.write_text(text)
        with pytest.raises(typer.Exit) as raised:
            script.main(check=True)
        assert raised.value.exit_code == 1
    script.main()
    assert page.read_text() == (GUIDES / "api.md").read_text()


def test_every_name_and_every_argument_is_there(script: ModuleType) -> None:
    text = (GUIDES / "api.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", text, re.M | re.S))
    assert sections.keys() == set(hf_ema_scaling.__all__) - {"__version__"}
    assert "hf_ema_scaling.scaling.momentum.scale_momentum" in sections["scale_momentum"]
    assert "- `kappa`: Batch size over reference batch size; any real number above 0." in sections["scale_momentum"]
    for name in ("noise_scale_every", "ema_half_life", "hub_weights"):
        assert f"`{name}` (" in sections["EMATrainingArguments"]
    assert "per_device_eval_batch_size" not in sections["EMATrainingArguments"]
    assert "0x" not in text


def test_a_docstring_becomes_lists(script: ModuleType) -> None:
    docstring = "Does it.\n\nArgs:\n    one: the first,\n        on two lines.\n    **rest: others.\n"
    docstring += "\nRaises:\n    ValueError: never."
    assert script.markdown(docstring).splitlines() == [
        *("Does it.", "", "**Args**", "", "- `one`: the first,", "  on two lines.", "- `**rest`: others.", ""),
        *("**Raises**", "", "- `ValueError`: never."),
    ]
    assert script.markdown("Makes it.\n\nReturns:\n    What: it is.\n\nSource: a book.").splitlines() == [
        *("Makes it.", "", "**Returns**", "", "What: it is.", "", "Source: a book."),
    ]
