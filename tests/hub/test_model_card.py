"""What the card of a model says, and that its metadata is valid without asking anyone."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hub.test_markdown import HOSTILE, one_line, seen
from huggingface_hub import ModelCard

from hf_ema_scaling.hub import CardDetails, render_model_card, stage
from hf_ema_scaling.hub.results import Score, scores

METRICS = {
    "train_loss": 1.0,
    "optimizer_steps": 3,
    "eval_clean_wer": 0.21,
    "eval_ema_clean_wer": 0.18,
    "eval_clean_runtime": 3.0,
    "eval_ema_clean_loss": None,
    "eval_clean_loss": 2.5,
    "eval_bleu": 31.0,
    "eval_ema_bleu": 32.0,
    "eval_samples_per_second": 10.0,
}
LEDGER = {
    "unit": "seconds",
    "used": {
        "radio": {"kept": {"items": 6, "seconds": 30.0}, "confidence": {"items": 2, "seconds": 10.0}},
        "": {"empty": {"items": 1, "seconds": 0.0}},
    },
    "made": {},
}
RECORD = {
    "command": ["python", "recipes/asr_ctc.py", "--config", "my `recipe`.yaml", "--kappa", "2"],
    "data": {"labelled": "owner/speech:clean:train", "evaluation": "dev/*.wav"},
    "hub_datasets": ["owner/speech"],
    "base_model": "owner/base",
    "base_model_on_hub": True,
    "versions": {"torch": "2.14.0"},
    "processes": 1,
    "settings": {},
}


def write(folder: Path, /, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def parts(card: str) -> tuple[dict[str, Any], str]:
    parsed = ModelCard(card)
    return parsed.data.to_dict(), parsed.text


def row(text: str, start: str) -> list[str]:
    """Cells of the row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_of_student_and_average(run: Path) -> None:
    write(run, metrics=METRICS, run=RECORD)
    details = CardDetails(language=("en",), license="mit", datasets=("owner/more",), tags=("speech", "ema"))
    data, text = parts(render_model_card(run, repo_id="tester/model", details=details))
    results = data["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["clean", "evaluation set"]
    assert all(result["task"]["type"] == "automatic-speech-recognition" for result in results)
    metrics = [(metric["type"], metric["name"], metric["value"]) for result in results for metric in result["metrics"]]
    assert metrics == [
        ("wer", "WER (average)", 0.18),
        ("wer", "WER (student)", 0.21),
        ("loss", "loss (student)", 2.5),
        ("bleu", "bleu (average)", 32.0),
        ("bleu", "bleu (student)", 31.0),
    ]
    del data["model-index"]
    assert data == {
        "language": ["en"],
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "base_model": "owner/base",
        "datasets": ["owner/more", "owner/speech"],
        "metrics": ["wer"],
        "tags": ["ema", "ema-scaling", "hf-ema-scaling", "speech"],
    }
    assert row(text, "clean | WER") == ["clean", "WER", "0.1800", "0.2100"]
    assert row(text, "clean | loss") == ["clean", "loss", "not measured", "2.5000"]
    other = parts(render_model_card(run, hub_weights="student"))
    assert row(other[1], "clean | WER") == ["clean", "WER", "0.2100", "0.1800"]
    assert other[0]["model-index"][0]["results"][0]["metrics"][0]["name"] == "WER (student)"
    assert "root of this repository are the student's; the average's are in `ema/`" in " ".join(other[1].split())


def test_recipe_and_scaled_values(run: Path) -> None:
    """Reference batch 4, momentum 0.9; kappa 1 for two reference steps, then 2."""
    _, text = parts(render_model_card(run))
    assert row(text, "value") == ["value", "reference", "stage 0", "stage 1"]
    assert row(text, "kappa") == ["kappa", "1", "1", "2"]
    assert row(text, "EMA momentum") == ["EMA momentum", "0.9", "0.9", "0.81"]
    assert row(text, "peak learning rate") == ["peak learning rate", "0.03", "0.03", "0.04242641"]
    assert row(text, "betas") == ["betas", "0.9, 0.999", "0.9, 0.999", "0.81, 0.998001"]
    told = " ".join(text.split())
    assert "rho = 0.9 per reference step of 4 samples: a half-life of 26.3153 samples" in told
    assert "by stage: 1, 2; momentum of one optimizer step by stage: 0.9, 0.81 (rho ** kappa)" in told
    assert "3 optimizer steps stand for 4 reference steps." in told and "1,270 parameters" in told
    assert "The plan warned: kappa \\* (1 - ema\\_momentum) is 0.2 at kappa=2" in told
    assert "![curve](curve.png)" in text and "## Pseudo-labels" not in text


def test_the_figures_of_a_report_are_in_the_card(run: Path, tmp_path: Path) -> None:
    """`report` draws them into a folder beside its page."""
    (run / "report_figures").mkdir()
    (run / "report_figures" / "metrics.png").write_bytes(b"\x89PNG another")
    text = stage(run, tmp_path / "staged").read_text(encoding="utf-8")
    assert "](report_figures/metrics.png)" in text and "](curve.png)" in text
    assert (tmp_path / "staged" / "report_figures" / "metrics.png").read_bytes() == b"\x89PNG another"


def test_ledger_and_record(run: Path) -> None:
    plan = json.loads((run / "scaling_plan.json").read_text(encoding="utf-8"))
    plan["recipe"]["pl_start"] = 2
    data, text = parts(render_model_card(write(run, ledger=LEDGER, run=RECORD, scaling_plan=plan)))
    assert row(text, "radio | kept") == ["radio", "kept", "6", "30", "75.0%"]
    assert row(text, "radio | confidence") == ["radio", "confidence", "2", "10", "25.0%"]
    assert row(text, "all | empty") == ["all", "empty", "1", "0", "n/a"]
    assert "pseudo-labels" in data["tags"] and "mistakes that the average makes" in text
    command = "python recipes/asr_ctc.py \\\n    --config 'my `recipe`.yaml' \\\n    --kappa 2"
    assert f"```bash\n{command}\n```" in text
    assert "Ran on 1 process with torch 2.14.0." in text
    assert "- labelled: owner/speech:clean:train\n- evaluation: dev/\\*.wav\n" in text


def test_the_ledger_has_seconds_beside_the_unit(run: Path) -> None:
    cells = {
        "kept": {"items": 3, "samples": 3.0, "seconds": 7.5},
        "rate": {"items": 1, "samples": 1.0, "seconds": 2.5},
    }
    _, text = parts(render_model_card(write(run, ledger={"unit": "samples", "used": {"radio": cells}, "made": {}})))
    assert row(text, "radio | kept") == ["radio", "kept", "3", "3", "7.5", "75.0%"]
    assert row(text, "Source | Outcome") == ["Source", "Outcome", "Items", "samples", "seconds", "Share"]


@pytest.mark.parametrize(("outcome", "learnt"), [("empty", False), ("kept", True)])
def test_limits_tell_whether_any_label_was_kept(run: Path, outcome: str, learnt: bool) -> None:
    plan = json.loads((run / "scaling_plan.json").read_text(encoding="utf-8"))
    plan["recipe"]["pl_start"] = 2
    ledger = {"unit": "samples", "used": {"": {outcome: {"items": 4, "samples": 4.0}}}, "made": {}}
    _, text = parts(render_model_card(write(run, ledger=ledger, scaling_plan=plan)))
    assert ("mistakes that the average makes" in text) == learnt
    assert ("No label of its own average was kept" in text) != learnt


def test_a_run_that_recorded_nothing(run: Path) -> None:
    for name in ("scaling_plan.json", "metrics.json", "curve.png"):
        (run / name).unlink()
    data, text = parts(render_model_card(run))
    assert "model-index" not in data and "license" not in data
    for told in ("was not evaluated", "data was not recorded", "plan was not recorded", "command was not recorded"):
        assert told in text
    assert "Not stated: ask the owner" in text and "## Figures" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_everywhere(run: Path, text: str) -> None:
    """The page has the elements that it has with harmless names, and shows each name as it is."""
    plan = json.loads((run / "scaling_plan.json").read_text(encoding="utf-8"))

    def card(name: str) -> str:
        record = {**RECORD, "data": {name: name}, "command": ["python", name], "base_model": name}
        record |= {"versions": {name: name}, "hub_datasets": [name]}
        ledger = {"unit": "samples", "used": {name: {name: {"items": 1, "samples": 1.0}}}}
        metrics = {f"eval_{name}": 1.0, f"eval_{name}_wer": 0.5}
        write(run, run=record, ledger=ledger, metrics=metrics, scaling_plan={**plan, "warnings": [name], "rule": name})
        return render_model_card(run, details=CardDetails(title=name, tags=(name,), limits=name))

    harmless, hostile = card("harmless"), card(text)
    (before, elements), (after, found) = (seen(parts(page)[1]) for page in (harmless, hostile))
    assert found == elements
    assert after.count(one_line(text)) >= before.count("harmless") - 1  # the command is quoted for the shell
    data, expected = parts(hostile)[0], one_line(text)
    assert data["tags"][3] == expected and "base_model" not in data and "datasets" not in data
    assert data["model-index"][0]["name"] == expected
    assert data["model-index"][0]["results"][0]["metrics"][0]["type"] == expected
    assert data.keys() == parts(harmless)[0].keys() - {"base_model", "datasets"}


def test_nobody_is_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert render_model_card(run, repo_id="tester/model").startswith("---\nlibrary_name: transformers\n")


def test_scores() -> None:
    assert scores(METRICS) == [
        Score("clean", "wer", 0.21, 0.18),
        Score("clean", "loss", 2.5, None),
        Score("", "bleu", 31.0, 32.0),
    ]
    assert scores({"eval_probe_accuracy": 0.5, "eval_ema_a_b_cer": 1, "eval_loss": float("nan"), "eval_x": True}) == [
        Score("", "probe_accuracy", 0.5, None),
        Score("a_b", "cer", None, 1.0),
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"language": ("english",)}, "ISO 639.*'english'"),
        ({"license": "Apache 2.0"}, "lower case.*'Apache 2.0'"),
        ({"datasets": ("data/a/b.jsonl",)}, "'data/a/b.jsonl' is no name on the Hub"),
        ({"base_model": "./runs/x"}, "no name on the Hub"),
    ],
)
def test_details_that_the_hub_would_refuse(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CardDetails(**changes)


def test_other_weights_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="hub_weights must be one of ema, student, got 'both'"):
        render_model_card(run, hub_weights="both")
