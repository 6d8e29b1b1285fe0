"""The script runs, its rows have the columns that others read, and its judge tells right averages from wrong ones."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmark_ema.py"
    spec = importlib.util.spec_from_file_location("benchmark_ema", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_ema"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


script = load()
app = typer.Typer()
app.command()(script.main)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["--quick", "--rounds", "2", "--steps", "30", *options])


def test_json_has_the_agreed_columns() -> None:
    result = run("--json", "--model", "many-small")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert all(list(row) == ["name", "model", "dtype", "ms", "ratio_to_limit", "right"] for row in rows)
    assert {(row["model"], row["dtype"]) for row in rows} == {("many-small", "fp32"), ("many-small", "bf16")}
    by_name = {(row["name"], row["dtype"]): row for row in rows}
    for dtype in ("fp32", "bf16"):
        limit, ours = by_name[script.LIMIT, dtype], by_name[script.OURS, dtype]
        assert limit["name"].startswith("limit") and ours["name"].startswith("ours")
        assert limit["ratio_to_limit"] == 1.0 and limit["right"] is None
        assert ours["right"] is True and ours["ratio_to_limit"] > 0 and ours["ms"] > 0
    averaged = by_name["torch AveragedModel", "bf16"], by_name["torch AveragedModel, use_buffers", "fp32"]
    assert [row["right"] for row in averaged] == [False, False]
    assert by_name["torch AveragedModel", "fp32"]["right"] is True


def test_a_table_for_people() -> None:
    result = run("--model", "wav2vec2-94M", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "wav2vec2-94M, fp32" in result.output and "x limit" in result.output
    assert "yes    ours (WeightAverage): within" in result.output
    assert "NO     torch AveragedModel, use_buffers: counter differs" in result.output


def test_unknown_names_are_refused() -> None:
    assert run("--model", "bert").exit_code == 2
    assert run("--dtype", "fp16").exit_code == 2


def test_the_judge_sees_each_defect() -> None:
    def mutant(change: Any) -> Any:
        def build(model: nn.Module) -> Any:
            average = script.ours(model)
            update = average.update

            def changed() -> None:
                change(model, average.tensors(), update)

            average.update = changed
            return average

        return build

    def twice(model: nn.Module, kept: Any, update: Any) -> None:
        update()
        update()

    def in_half(model: nn.Module, kept: Any, update: Any) -> None:
        update()
        for tensor in kept.values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())

    def tied_twice(model: nn.Module, kept: Any, update: Any) -> None:
        update()
        with torch.no_grad():
            kept["extras.embedding.weight"].lerp_(model.extras.embedding.weight.float(), 1 - script.RHO)  # type: ignore

    def no_counter(model: nn.Module, kept: Any, update: Any) -> None:
        update()
        kept["extras.counter"].zero_()

    def broken(model: nn.Module, kept: Any, update: Any) -> None:
        raise RuntimeError("lost")

    builds = {
        "right": script.ours,
        "nothing": mutant(lambda *_: None),
        **{one.__name__: mutant(one) for one in (twice, in_half, tied_twice, no_counter, broken)},
    }
    found = script.judge(builds, script.build_model("many-small", torch.float32, small=True), 20)
    assert found["right"][0] is True and found["broken"] == (None, "raises RuntimeError: lost")
    for name, word in (
        ("nothing", "weights"), ("twice", "weights"), ("in_half", "weights"), ("tied_twice", "tied weight"),
        ("no_counter", "counter"),
    ):  # fmt: skip
        assert found[name][0] is False and found[name][1].startswith(word), (name, found[name])


def test_temporaries_are_counted() -> None:
    x, y = torch.randn(100), torch.randn(100)
    with script.NewStorage() as seen:
        x.mul_(0.5).add_(y)
        x.view(10, 10).t()
    assert seen.bytes == 0
    with script.NewStorage() as seen:
        x.sub_((x - y).mul_(0.5))
    assert seen.bytes == 400


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_adapters() -> None:
    rows = json.loads(run("--json", "--model", "lora", "--dtype", "fp32").stdout)["rows"]
    assert {row["name"]: row["right"] for row in rows}[script.OURS] is True


def test_ratios_are_taken_within_a_round() -> None:
    row = script.Row("ours", "lora", "fp32", milliseconds=[2.0, 30.0, 4.0], limits=[1.0, 10.0, 2.0])
    assert (row.to_json()["ms"], row.to_json()["ratio_to_limit"]) == (4.0, 2.0)
    assert script.Row("peer", "lora", "fp32", limits=[1.0]).to_json() == {
        "name": "peer", "model": "lora", "dtype": "fp32", "ms": None, "ratio_to_limit": None, "right": None,
    }  # fmt: skip
