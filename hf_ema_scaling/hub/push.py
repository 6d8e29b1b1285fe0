"""Pushing a run, one of its checkpoints, or a labelled data set: a staging folder first, then one commit."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from hf_ema_scaling.ema.folders import EMA_FOLDER
from hf_ema_scaling.hub.details import CardDetails
from hf_ema_scaling.hub.labels import is_labelled, stage_labels
from hf_ema_scaling.hub.model_card import SUBFOLDERS, WEIGHT_SETS, model_card
from hf_ema_scaling.hub.publish import TIMEOUT, Target, client, persistently, publish
from hf_ema_scaling.hub.run_folder import LEDGER_NAME, METRICS_NAME, PLAN_NAME, RECORD_NAME, RunFolder, read_run

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
FIGURES = "figures"
STAGING_PREFIX = ".push-"
RECORDS = (PLAN_NAME, METRICS_NAME, LEDGER_NAME, RECORD_NAME)
_MODEL_FILES = (
    rf"(?:student|{EMA_FOLDER})/.*"
    r"|(?:adapter_)?model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"
    r"|ema_state\.json|average_float64\.safetensors|buffers\.safetensors|adapter_config\.json"
    rf"|{'|'.join(name.replace('.', chr(92) + '.') for name in RECORDS)}|figures/.*\.png|[^/]*\.png"
)
"""What a push of a run puts in its place or deletes: the other layout's weights must not stay."""
_LABEL_FILES = r"data/[^/]*\.parquet"

Place = Callable[[Path, Path], object]
"""Puts a file at another path: `os.symlink`, `os.link` or `shutil.copy2`."""
Draw = Callable[[Path, Path], Sequence[str]]
"""Draws figures about a run's folder into another folder; returns their names there."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    hub_weights: str = "ema",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    details: CardDetails | None = None,
    draw: Draw | None = None,
    api: HfApi | None = None,
    wait: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> CommitInfo:
    """Pushes a finished run, or a data set that `hf-ema-scaling label` wrote, with a card, in one commit.

    `folder` is only read. What the repository already has is not sent again; pushing the same once more makes no
    commit.

    Args:
        folder: `output_dir` of a run, one of its checkpoints, or a folder of labels.
        repo_id: `OWNER/NAME`; made if it is not there.
        hub_weights: `ema` puts the average at the root and the student into `student/`; `student` puts the student at
            the root and the average into `ema/`. Of no meaning for data sets.
        private: whether a new repository is private; None for the owner's default.
        revision: branch; None for `main`.
        token: None for `HF_TOKEN` or the one that `hf auth login` stored.
        message: of the commit.
        details: what the card should say beyond what the folder knows.
        draw: draws figures of a run for this push, such as `hf_ema_scaling.report.draw_figures`; without it, or where
            it fails, those are pushed that the folder has.
        api: client of `huggingface_hub`.
        wait: called with seconds between attempts.
        timeout: seconds without a byte after which a connection counts as dead.

    Returns:
        The commit, as from `huggingface_hub`.

    Raises:
        PushError: what happened on the way to the Hub, and what to do.
        RunFolderError, AverageStateError, ValueError: the folder cannot be pushed.
    """
    options: dict[str, Any] = {"private": private, "revision": revision, "token": token, "api": api, "wait": wait}
    told: dict[str, Any] = {"hub_weights": hub_weights, "message": message, "details": details, "draw": draw}
    return prepare(folder, repo_id, timeout=timeout, **told, **options)()


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    hub_weights: str = "ema",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    details: CardDetails | None = None,
    draw: Draw | None = None,
    place: Place | None = None,
    beside: Path | None = None,
    api: HfApi | None = None,
    wait: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> Callable[[], CommitInfo]:
    """Lays out now what the function that it returns pushes, once; arguments and errors as for `push`.

    Args:
        folder: as for `push`.
        repo_id: as for `push`.
        hub_weights: as for `push`.
        private: as for `push`.
        revision: as for `push`.
        token: as for `push`.
        message: as for `push`.
        details: as for `push`.
        draw: as for `push`.
        place: puts a file of `folder` at its place; links suffice unless `folder` changes before it is pushed.
        beside: folder in which it is laid out; None for the system's temporary folder.
        api: as for `push`.
        wait: as for `push`.
        timeout: as for `push`.
    """
    api = api or client()
    labels = is_labelled(folder)
    again = repeat(folder, repo_id, hub_weights=hub_weights, private=private, revision=revision)
    target = Target(repo_id, "dataset" if labels else "model", private, revision, token)
    told: dict[str, Any] = {"source": str(folder), "again": again, "wait": wait, "timeout": timeout}
    temporary = tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=beside)
    try:
        if "/" not in repo_id:  # the card says where the model is
            user = persistently(lambda: api.whoami(token=token)["name"], target, **told)
            target = replace(target, repo_id=f"{user}/{repo_id}")
        stage(
            folder,
            temporary.name,
            repo_id=target.repo_id,
            hub_weights=hub_weights,
            details=details,
            draw=draw,
            place=place or linked,
        )
    except BaseException:
        temporary.cleanup()
        raise

    def publish_it() -> CommitInfo:
        with temporary:
            return publish(
                Path(temporary.name),
                target,
                message=message or ("Labels" if labels else f"Model, {hub_weights} at the root"),
                replaces=_LABEL_FILES if labels else _MODEL_FILES,
                api=api,
                **told,
            )

    return publish_it


def prepare_mirror(
    folder: str | Path,
    repo_id: str,
    within: str,
    *,
    message: str,
    place: Place,
    beside: Path,
    api: HfApi,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Callable[[], CommitInfo]:
    """As `prepare`, for all files of a folder as they are.

    Args:
        folder: a checkpoint.
        repo_id: as for `push`.
        within: folder in the repository, which then holds these files and no others.
        message: of the commit.
        place: as for `prepare`.
        beside: as for `prepare`.
        api: as for `push`.
        private: as for `push`.
        revision: as for `push`.
        token: as for `push`.
    """
    folder = Path(folder)
    temporary = tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=beside)
    for path in folder.rglob("*"):
        if path.is_file():
            placed(place, path, Path(temporary.name) / path.relative_to(folder))
    words = ["hf", "upload", repo_id, str(folder), within, *(["--revision", revision] if revision else [])]

    def publish_it() -> CommitInfo:
        with temporary:
            return publish(
                Path(temporary.name),
                Target(repo_id, "model", private, revision, token, within),
                message=message,
                replaces=".*",
                source=str(folder),
                again=shlex.join(words),
                api=api,
            )

    return publish_it


def stage(
    folder: str | Path,
    target: str | Path,
    *,
    repo_id: str | None = None,
    hub_weights: str = "ema",
    details: CardDetails | None = None,
    draw: Draw | None = None,
    place: Place | None = None,
) -> Path:
    """Lays out in `target` what `push` pushes, as links to the files in `folder` where the system has such.

    Args:
        folder: as for `push`.
        target: an empty or new folder.
        repo_id: for the card.
        hub_weights: as for `push`.
        details: as for `push`.
        draw: as for `push`.
        place: as for `prepare`.

    Returns:
        The card's path.

    Raises:
        RunFolderError, AverageStateError, ValueError: the folder cannot be pushed.
    """
    target, details, place = Path(target), details or CardDetails(), place or linked
    if is_labelled(folder):
        card = stage_labels(Path(folder), target, repo_id=repo_id, details=details, place=place)
    else:
        run = read_run(folder)
        told: dict[str, Any] = {"repo_id": repo_id, "hub_weights": hub_weights, "details": details}
        card = stage_run(run, target, draw=draw, place=place, **told)
    path = target / CARD_NAME
    path.write_text(card, encoding="utf-8")
    return path


def stage_run(
    run: RunFolder,
    target: Path,
    *,
    repo_id: str | None,
    hub_weights: str,
    details: CardDetails,
    place: Place,
    draw: Draw | None = None,
) -> str:
    """Lays a run out; returns its card, which is not written."""
    drawn = _drawn(run, target, draw)
    figures = [*drawn, *(name for name in run.figures() if not _is_older(name, drawn))]
    card = model_card(run, repo_id=repo_id, hub_weights=hub_weights, details=details, figures=figures)
    root = {name: target if name == hub_weights else target / SUBFOLDERS[hub_weights] for name in WEIGHT_SETS}
    for name in run.student_files():
        placed(place, run.folder / name, root["student"] / name)
    for name, staged in run.average_files().items():
        placed(place, run.average / name, root["ema"] / staged)
    for name in figures[len(drawn) :]:
        placed(place, run.folder / name, target / name)
    # Those of a checkpoint come from the run that it lies in, and from its own log.
    for name, content in zip(RECORDS, (run.plan, run.metrics, run.ledger, run.record), strict=True):
        if content:
            (target / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return card


def _drawn(run: RunFolder, target: Path, draw: Draw | None) -> list[str]:
    """Figures drawn into the staging folder; none, with a warning, where that fails: they are not worth a push."""
    if draw is None:
        return []
    place = target / FIGURES
    try:
        return [f"{FIGURES}/{name}" for name in draw(run.folder, place)]
    except Exception as error:
        shutil.rmtree(place, ignore_errors=True)
        logger.warning("No figures are drawn of %s: %s", run.folder, error)
        return []


def _is_older(name: str, drawn: Sequence[str]) -> bool:
    """Whether a figure of the folder is one that is drawn anew: by a report, or in its place."""
    return name in drawn or ("_figures/" in name and f"{FIGURES}/{Path(name).name}" in drawn)


def linked(source: Path, target: Path) -> None:
    """A symbolic link to the file itself."""
    os.symlink(source.resolve(), target)


def placed(place: Place, source: Path, target: Path) -> None:
    """`place`, or a copy where the system refuses: no links, or another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        place(source, target)
    except OSError:
        shutil.copy2(source, target)


def repeat(
    folder: str | Path,
    repo_id: str,
    *,
    hub_weights: str = "ema",
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """The command line that pushes the same folder to the same place."""
    words = ["hf-ema-scaling", "push", str(folder), "--repo_id", repo_id]
    if hub_weights != "ema":
        words += ["--hub_weights", hub_weights]
    if private is not None:
        words.append("--private" if private else "--public")
    if revision is not None:
        words += ["--revision", revision]
    return shlex.join(words)
