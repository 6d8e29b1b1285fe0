"""The card of a model: what was trained on what, how it was scaled, and how good student and average are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ema_scaling.hub.details import CardDetails, is_repo_id, library_version
from hf_ema_scaling.hub.markdown import Markdown, command, fenced, image, plain, render, table
from hf_ema_scaling.hub.results import Score, scores
from hf_ema_scaling.hub.run_folder import RunFolder, read_run
from hf_ema_scaling.scaling.table import value_rows

WEIGHT_SETS = ("ema", "student")
NAMES = {"ema": "average", "student": "student"}
SUBFOLDERS = {"ema": "student", "student": "ema"}
"""By `hub_weights`: the folder of the weights that are not at the root."""
OWN_MODELS = {"BYOLModel": "hf_ema_scaling"}
"""Packages of models that transformers does not have."""
TAGS = ("ema", "ema-scaling", "hf-ema-scaling")


def render_model_card(
    run_folder: str | Path,
    *,
    repo_id: str | None = None,
    hub_weights: str = "ema",
    details: CardDetails | None = None,
) -> str:
    """The card of a run, with its metadata; nothing is sent or asked anywhere.

    Args:
        run_folder: `output_dir` of the run, or one of its checkpoints.
        repo_id: where it will be, for the lines that load it.
        hub_weights: `ema` or `student`, the weights at the repository's root.
        details: what the run does not know.

    Raises:
        RunFolderError, AverageStateError: the folder is no complete run.
        ValueError: for other `hub_weights`.
    """
    return model_card(read_run(run_folder), repo_id=repo_id, hub_weights=hub_weights, details=details or CardDetails())


def model_card(
    run: RunFolder,
    *,
    repo_id: str | None,
    hub_weights: str,
    details: CardDetails,
    figures: Sequence[str] | None = None,
) -> str:
    """As `render_model_card`, of a run that is read already; `figures` are paths in the repository."""
    if hub_weights not in WEIGHT_SETS:
        raise ValueError(f"hub_weights must be one of {', '.join(WEIGHT_SETS)}, got {hub_weights!r}")
    figures = run.figures() if figures is None else figures
    title = details.title or (repo_id or run.folder.resolve().name).rpartition("/")[2]
    found = scores(run.metrics)
    task = _task(run)
    architecture = _architecture(run)
    plan, record = run.plan, run.record
    base = details.base_model or _base(run)
    values = {
        "title": title,
        "repo": repo_id or "OWNER/NAME",
        "architecture": architecture or "PyTorch module",
        "parameters": f"{run.parameters():,}",
        "adapters": run.adapters,
        "root": NAMES[hub_weights],
        "other": NAMES["student" if hub_weights == "ema" else "ema"],
        "subfolder": SUBFOLDERS[hub_weights],
        "usage": _usage(run, architecture, repo_id or "OWNER/NAME", SUBFOLDERS[hub_weights]),
        "base_model": base,
        "data": _data_rows(record, details),
        "plan": plan,
        "plan_table": _plan_table(plan) if plan else "",
        "momentum": _momentum(plan) if plan else "",
        "results": _results_table(found, hub_weights),
        "steps": run.metrics.get("optimizer_steps"),
        "ledger": _ledger_table(run.ledger),
        "learnt": _learnt(run.ledger),
        "ledger_unit": run.ledger.get("unit", "samples"),
        "figures": [image(name, Path(name).stem.replace("_", " ")) for name in figures],
        "command": fenced(command(map(str, record["command"])), "bash") if record.get("command") else "",
        "preparation": fenced("\n".join(map(str, record["preparation"])), "bash") if record.get("preparation") else "",
        "settings": bool(record.get("settings")),
        "versions": ", ".join(f"{name} {version}" for name, version in dict(record.get("versions", {})).items()),
        "processes": record.get("processes", 1),
        "license": details.license,
        "limits": details.limits,
        "warnings": plan.get("warnings", []),
        "version": library_version(),
    }
    body = render("model_card.md.jinja", values)
    data = _metadata(run, title, task, found, hub_weights, details)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


# ---- Metadata


def _metadata(
    run: RunFolder, title: str, task: str | None, found: Sequence[Score], hub_weights: str, details: CardDetails
) -> ModelCardData:
    on_hub = [str(name) for name in run.record.get("hub_datasets", []) if is_repo_id(str(name))]
    base = details.base_model or (_base(run) if run.record.get("base_model_on_hub") else None)
    data_sets = list(dict.fromkeys([*details.datasets, *on_hub]))
    results = _eval_results(found, task or "other", hub_weights)
    pseudo = ["pseudo-labels"] if run.plan.get("recipe", {}).get("pl_start") is not None else []
    return ModelCardData(
        language=list(details.language) or None,
        license=details.license,
        library_name=_library(run),
        pipeline_tag=task,
        base_model=base if base is not None and is_repo_id(base) else None,
        datasets=data_sets or None,
        metrics=list(dict.fromkeys(score.metric for score in found if score.metric in ("wer", "cer", "accuracy")))
        or None,
        tags=list(dict.fromkeys([*TAGS, *pseudo, *map(_one_line, details.tags)])),
        model_name=_one_line(title),
        eval_results=results or None,
    )


def _eval_results(found: Sequence[Score], task: str, hub_weights: str) -> list[EvalResult]:
    results = []
    for score in found:
        values = {"ema": score.average, "student": score.student}
        for weights in sorted(WEIGHT_SETS, key=lambda name: name != hub_weights):
            if (value := values[weights]) is not None:
                name = _one_line(score.evaluation_set) or "evaluation set"
                results.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "evaluation-set",
                        dataset_name=name,
                        metric_type=_one_line(score.metric),
                        metric_value=value,
                        metric_name=_one_line(f"{score.label} ({NAMES[weights]})"),
                    )
                )
    return results


def _one_line(text: str) -> str:
    return " ".join(plain(text).split())


def _library(run: RunFolder) -> str | None:
    if run.adapters:
        return "peft"
    return "transformers" if run.config.get("model_type") else None


def _architecture(run: RunFolder) -> str | None:
    names = run.config.get("architectures") or []
    return str(names[0]) if names and str(names[0]).isidentifier() else None


def _task(run: RunFolder) -> str | None:
    """The Hub's name of what the model's head is for."""
    # Heavy, and of no use for data sets.
    from transformers.modelcard import TASK_MAPPING

    architecture = _architecture(run)
    # The more special of two tasks that share a head comes last.
    mapping: Mapping[str, Any] = TASK_MAPPING
    tasks = [task for task, heads in mapping.items() if architecture in heads.values()]
    return tasks[-1] if tasks else None


def _base(run: RunFolder) -> str | None:
    found = run.record.get("base_model") or run.config.get("base_model_name_or_path")
    return None if not found else str(found)


# ---- Parts of the text


def _usage(run: RunFolder, architecture: str | None, repo: str, subfolder: str) -> Markdown | str:
    name, folder = json.dumps(repo), json.dumps(subfolder)
    if run.adapters:
        lines = [
            "from peft import PeftModel",
            "",
            f"model = PeftModel.from_pretrained(base, {name})  # base: the model that was adapted",
            f"other = PeftModel.from_pretrained(base, {name}, subfolder={folder})",
        ]
    elif architecture is not None:
        home = OWN_MODELS.get(architecture, "transformers")
        lines = [
            f"from {home} import {architecture}",
            "",
            f"model = {architecture}.from_pretrained({name})",
            f"other = {architecture}.from_pretrained({name}, subfolder={folder})",
        ]
    else:
        lines = [
            "from huggingface_hub import hf_hub_download",
            "from safetensors.torch import load_file",
            "",
            f'weights = load_file(hf_hub_download({name}, "model.safetensors"))',
            f'other = load_file(hf_hub_download({name}, "model.safetensors", subfolder={folder}))',
        ]
    return fenced("\n".join(lines), "python")


def _data_rows(record: Mapping[str, Any], details: CardDetails) -> list[tuple[str, str]]:
    rows = [(str(key), str(value)) for key, value in dict(record.get("data", {})).items() if value is not None]
    return rows or [("data", name) for name in details.datasets]


def _plan_table(plan: Mapping[str, Any]) -> Markdown:
    rows = value_rows(plan["recipe"]["unit"], plan["reference"], plan["stages"])
    return table([[cell.strip() or "value" for cell in row[:1]] + row[1:] for row in rows])


def _momentum(plan: Mapping[str, Any]) -> Markdown:
    """rho, half-life and kappa in one sentence."""
    recipe, reference, stages = plan["recipe"], plan["reference"], plan["stages"]
    kappas = ", ".join(f"{stage['kappa']:g}" for stage in stages)
    scaled = ", ".join(f"{stage['momentum']:.6g}" for stage in stages)
    half_life = reference["half_life_units"]
    told = f"{half_life:.6g} {recipe['unit']}" if math.isfinite(half_life) else "infinite"
    how = "rho ** kappa" if plan["scale_ema"] else "not scaled (an ablation)"
    return Markdown(
        f"Momentum rho = {recipe['ema_momentum']:.6g} per reference step of {recipe['reference_batch_size']:g} "
        f"{recipe['unit']}: a half-life of {told}. Kappa (batch over reference batch) by stage: {kappas}; momentum of "
        f"one optimizer step by stage: {scaled} ({how})."
    )


def _results_table(found: Sequence[Score], hub_weights: str) -> Markdown | str:
    if not found:
        return ""
    order = ("average", "student") if hub_weights == "ema" else ("student", "average")
    rows: list[list[object]] = [["Evaluation set", "Metric", *(name.capitalize() for name in order)]]
    for score in found:
        values = {"student": score.student, "average": score.average}
        cells = ["not measured" if (value := values[name]) is None else f"{value:.4f}" for name in order]
        rows.append([score.evaluation_set or "evaluation set", score.label, *cells])
    return table(rows)


def _learnt(ledger: Mapping[str, Any]) -> bool:
    """Whether any label was kept; a run without a ledger is taken to have learnt from some."""
    sources = dict(ledger.get("used", {}))
    return not sources or any("kept" in outcomes for outcomes in sources.values())


def _ledger_table(ledger: Mapping[str, Any]) -> Markdown | str:
    """What became of the pseudo-labels that were used, by source and outcome."""
    unit = str(ledger.get("unit", "samples"))
    sources = dict(ledger.get("used", {}))
    found = {name for outcomes in sources.values() for cell in outcomes.values() for name in cell}
    others = [name for name in ("seconds", "tokens") if name in found - {unit}]
    rows: list[list[object]] = [["Source", "Outcome", "Items", unit, *others, "Share"]]
    for source, outcomes in sources.items():
        total = sum(float(cell[unit]) for cell in outcomes.values())
        for reason in sorted(outcomes, key=lambda name: (name != "kept", name)):
            cell = outcomes[reason]
            share = f"{float(cell[unit]) / total:.1%}" if total else "n/a"
            sizes = [float(cell.get(name, 0.0)) for name in (unit, *others)]
            rows.append([source or "all", reason, int(cell["items"]), *sizes, share])
    return table(rows) if len(rows) > 1 else ""
