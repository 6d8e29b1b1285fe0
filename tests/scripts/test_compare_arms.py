from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "compare_arms.py"
    spec = importlib.util.spec_from_file_location("compare_arms", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def test_means_spreads_and_pairs() -> None:
    results = {
        "labelled": {seed: {"eval_accuracy": 0.5 + 0.1 * seed, "eval_ema_b_accuracy": 0.5} for seed in range(3)},
        "pseudo": {
            seed: {"eval_accuracy": value, "eval_ema_b_accuracy": 0.75} for seed, value in ((0, 0.6), (2, 0.6))
        },
    }
    lines = [line.split() for line in script.table(results, "accuracy").splitlines()]
    # Pairs 0 and 2: + 0.1 and - 0.1.
    assert lines[1] == ["student", "0.6000", "(0.1000)", "0.6000", "(0.0000)", "0.0000", "(0.1414)", "1", "of", "2"]
    assert lines[2][:2] == ["b", "average"] and lines[2][-5:] == ["0.2500", "(0.0000)", "2", "of", "2"]
    assert lines[3][-2:] == ["0,", "2"]
    with pytest.raises(ValueError, match="no run has the metric 'f1'"):
        script.table(results, "f1")


def test_both_arms_run_once_for_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("recipe: text_classification\nlabelled: a\nunlabelled: b\nmodel_config: {}\nseed: 9\n")
    ran: list[tuple[Any, ...]] = []

    def build(data: Any, model: Any, views: Any, soft: Any, args: Any, pseudo: Any) -> Any:
        ran.append((Path(args.output_dir).name, args.seed, data.unlabelled, args.max_steps))
        return args

    def run(args: Any) -> None:
        folder = Path(args.output_dir)
        (folder / "ema").mkdir(parents=True)
        (folder / "ema" / "model.safetensors").touch()
        (folder / "metrics.json").write_text(json.dumps({"eval_accuracy": float(args.seed)}))

    kind = script.kind_of_file(config)
    monkeypatch.setattr(script, "kind_of_file", lambda path: type(kind)(kind.arguments, build))
    monkeypatch.setattr(script, "run", run)
    more = ["--max_steps", "7", "--reference_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
    script.main(tmp_path / "out", config, seeds=2, arguments=more)
    expected = [
        ("labelled-0", 0, None, 7),
        ("pseudo-0", 0, "b", 7),
        ("labelled-1", 1, None, 7),
        ("pseudo-1", 1, "b", 7),
    ]
    assert ran == expected and not list((tmp_path / "out").rglob("*.safetensors"))
    capsys.readouterr()
    script.main(tmp_path / "out", config, seeds=3, arguments=more)
    assert [name for name, *_ in ran[4:]] == ["labelled-2", "pseudo-2"]
    assert "1.0000 (1.0000)" in capsys.readouterr().out
