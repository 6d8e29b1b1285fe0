"""`hf-ema-scaling`: the command line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

main = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"comma-separated numbers are expected, got {text!r}", param_hint=option) from error


def _mapping(text: str | None, option: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is no JSON ({error})", param_hint=option) from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"a JSON mapping is expected, got {text!r}", param_hint=option)
    return found


@main.callback()
def _commands() -> None:
    """Tune once at a small reference batch; run at any batch; teach with the average of the weights."""


@main.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Run folders, report.png and summary.json.")
    ] = Path("runs/demo"),
    kappa: Annotated[
        float, typer.Option(min=0.01, help="Batch over reference batch once pseudo-labels have started.")
    ] = 1.0,
    arms: Annotated[str, typer.Option(help="Comma-separated: labelled, pseudo, topline.")] = "labelled,pseudo",
    seed: Annotated[int, typer.Option(help="Of corpus, initialisation, order, dropout and augmentation.")] = 0,
    steps: Annotated[int | None, typer.Option(min=10, help="Reference steps; default: the tuned recipe's.")] = None,
    scale_ema: Annotated[
        bool,
        typer.Option(
            "--scale_ema/--no_scale_ema",
            "--scale-ema/--no-scale-ema",
            help="--no-scale-ema leaves the momentum unscaled (an ablation).",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Trains a small speech model from scratch that learns from the pseudo-labels of its own EMA teacher."""
    from hf_ema_scaling.demo import ARMS, DemoConfig, run_demo, table

    names = [arm.strip() for arm in arms.split(",") if arm.strip()]
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise typer.BadParameter(f"arms are {', '.join(ARMS)}; got {arms!r}", param_hint="--arms")
    config = DemoConfig() if steps is None else DemoConfig().of_length(steps)
    try:
        summary = run_demo(output_dir, arms=names, kappa=kappa, seed=seed, scale_ema=scale_ema, config=config)
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="--output-dir") from error
    except ImportError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(summary))
        return
    typer.echo(table(summary))
    typer.echo(f"report: {output_dir / 'report.png'}")


@main.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a recipe; other arguments of it may follow, or stand alone.")
    ] = None,
    kappas: Annotated[
        str, typer.Option(help="Comma-separated: compare the recipe at these, e.g. 1,2,4,8, in one table.")
    ] = "",
    steps_per_epoch: Annotated[
        float | None,
        typer.Option(
            "--steps_per_epoch",
            "--steps-per-epoch",
            min=0.0,
            help="Reference steps in a pass over the labelled set, if epochs count.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list with --kappas.")] = False,
) -> None:
    """Prints the values of a recipe at its reference batch and scaled, stage by stage, and what to beware of.

    Arguments of recipes are listed by their scripts: python recipes/asr_ctc.py --help
    """
    from hf_ema_scaling.recipe.planning import plan_recipe
    from hf_ema_scaling.scaling.table import comparison_table

    extra = list(context.args)
    if config is not None and str(config).startswith("--"):
        config, extra = None, [str(config), *extra]
    try:
        wanted = _numbers(kappas, "--kappas")
        plans = plan_recipe(config, extra, kappas=wanted, steps_per_epoch=steps_per_epoch)
    except (ValueError, OSError) as error:
        typer.secho(f"{error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    if as_json:
        listed = [{"kappa": found.stage_values()[-1]["kappa"]} | found.to_dict() for found in plans]
        typer.echo(json.dumps(listed if wanted else listed[0]))
    else:
        typer.echo(comparison_table(plans) if wanted else plans[0].explain())


@main.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of a recipe; other arguments of it may follow.")],
    rows: Annotated[int, typer.Option(help="Rows of each data set to look at.")] = 256,
) -> None:
    """Checks a recipe without training: data, labels, loss, teacher and plan. Exit code 1 if a check fails.

    Arguments of recipes are listed by their scripts: python recipes/asr_ctc.py --help
    """
    from hf_ema_scaling.recipe import parse
    from hf_ema_scaling.recipe.registry import kind_of_file
    from hf_ema_scaling.training.self_check import FAILED, check_table, self_check

    with tempfile.TemporaryDirectory() as folder:
        # Last, so that nothing of the run is touched and nothing leaves the machine.
        own = ["--output_dir", folder, "--push_to_hub", "false", "--report_to", "none"]

        def build() -> Any:
            kind = kind_of_file(config)
            return kind.build(*parse(kind.arguments, ["--config", str(config), *context.args, *own]))

        results = self_check(build, rows=rows)
    typer.echo(check_table(results))
    raise typer.Exit(int(any(found.result == FAILED for found in results)))


@main.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders (output_dir) or checkpoints; finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file; default: report.html in the run folder, or here for several."),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Write PNG figures too, into a folder beside the page.")] = True,
) -> None:
    """Writes one HTML page about runs, and figures: metrics, batch, momentum, pseudo-labels, ledger, comparison."""
    from hf_ema_scaling.report import read_runs, write_report

    if output is None:
        output = (runs[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        found = read_runs(runs)
        for path in write_report(found, output, figures=figures):
            typer.echo(path)
    except (ValueError, OSError, ImportError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


@main.command()
def label(
    model: Annotated[
        str, typer.Argument(help="The model that labels: a folder such as run/ema, or a name on the Hub.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A manifest (.jsonl, .csv), an audio folder, a saved data set (folder:split), or owner/name:split."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the labels; a run that was killed goes on.")],
    column: Annotated[
        str | None,
        typer.Option(help="Column that is read [audio; text to classify, tokens to tag; source, or prompt to go on]."),
    ] = None,
    keep_columns: Annotated[
        str | None,
        typer.Option("--keep_columns", "--keep-columns", help="Comma-separated columns to keep [what is read]."),
    ] = None,
    batch_size: Annotated[
        float | None,
        typer.Option(
            "--batch_size", "--batch-size", help="Padded seconds [240] or tokens [16384] of a batch; bounds memory."
        ),
    ] = None,
    shard_rows: Annotated[
        int, typer.Option("--shard_rows", "--shard-rows", help="Most rows of a file; what a kill can cost.")
    ] = 2000,
    shard_size: Annotated[
        float | None,
        typer.Option("--shard_size", "--shard-size", help="Seconds [3600] or tokens [1000000] that close a file."),
    ] = None,
    min_seconds: Annotated[
        float, typer.Option("--min_seconds", "--min-seconds", help="Shorter audio is dropped.")
    ] = 0.0,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max_seconds", "--max-seconds", help="Longer audio is dropped [40; beyond Whisper's window: an error]."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max_length", "--max-length", help="Tokens at which texts to classify are cut, and others dropped."
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of the labels: Whisper's, SeamlessM4T's, or a code of the tokenizer.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Whisper's: transcribe or translate.")] = None,
    source_language: Annotated[
        str | None, typer.Option("--source_language", "--source-language", help="Of texts to translate.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Written before each text to translate, summarise or go on from.")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens", "--max-new-tokens", min=1, help="Tokens after which a label without end is given up."
        ),
    ] = None,
    options: Annotated[
        str | None,
        typer.Option(
            help='Others of the labels, as JSON: {"num_beams": 4}, of several classes {"thresholds": 0.4}, ...'
        ),
    ] = None,
    filters: Annotated[
        str | None, typer.Option(help='Filters by name, as JSON: {"repeat": {}, "rate": "fit", ...}; as in recipes.')
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="Rows with their text, a source like the data, for filters to be fitted on.")
    ] = None,
    labelled_column: Annotated[
        str | None,
        typer.Option(
            "--labelled_column", "--labelled-column", help="Column with that text [text, target or completion]."
        ),
    ] = None,
    second_view: Annotated[
        str | None,
        typer.Option(
            "--second_view", "--second-view", help='For the filter disagree, as JSON: {"noise": {"probability": 1}}.'
        ),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option("--min_confidence", "--min-confidence", help="Labels below are dropped.")
    ] = 0.0,
    on_bad_item: Annotated[
        str, typer.Option("--on_bad_item", "--on-bad-item", help="raise or skip: what to do with broken rows.")
    ] = "raise",
    streaming: Annotated[bool, typer.Option(help="Fetch rows as they are labelled.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu [a GPU if there is one].")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON instead of the table.")] = False,
) -> None:
    """Labels a data set with an averaged model: label, confidence and reason of each row, and where they come from."""
    from hf_ema_scaling.labelling import label_dataset, load_head
    from hf_ema_scaling.labelling.sources import open_data, open_labelled

    keep = None if keep_columns is None else [name.strip() for name in keep_columns.split(",") if name.strip()]
    try:
        more = _mapping(options, "--options")
        head = load_head(
            model,
            device=device,
            dtype=dtype,
            source_language=source_language,
            prefix=prefix,
            **{"language": language, "task": task, "max_new_tokens": max_new_tokens, **more},
        )
        rows = open_data(data, head.kind, column=column, keep=keep, streaming=streaming, on_bad_item=on_bad_item)
        known = None if labelled is None else open_labelled(labelled, head.kind, column, labelled_column, on_bad_item)
        summary = label_dataset(
            head,
            rows,
            output,
            data_name=data,
            column=column,
            keep=keep,
            batch_size=batch_size,
            shard_rows=shard_rows,
            shard_size=shard_size,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            max_length=max_length,
            min_confidence=min_confidence,
            filters=filters,
            labelled=known,
            labelled_column=labelled_column,
            second_view=second_view,
            on_bad_item=on_bad_item,
        )
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        typer.secho(f"{error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(summary.to_dict()) if as_json else summary.table())
    if not as_json:
        typer.echo(f"labels: {output}")


@main.command()
def push(
    run: Annotated[
        Path, typer.Argument(help="output_dir of a run, one of its checkpoints, or labels by `hf-ema-scaling label`.")
    ],
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", "--repo-id", help="OWNER/NAME on the Hub; made if it is not there.")
    ] = None,
    hub_weights: Annotated[
        str,
        typer.Option(
            "--hub_weights",
            "--hub-weights",
            help="ema: the average at the root, the student in student/. student: the other way, average in ema/.",
        ),
    ] = "ema",
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: as your account has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the card.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code for the card; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence for the card, such as apache-2.0.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set on the Hub that it was made of; may be repeated.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", "--base-model", help="Model on the Hub that training started from.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag for the card; may be repeated.")] = None,
    limits: Annotated[str | None, typer.Option(help="What else a user must know, for the card.")] = None,
    figures: Annotated[
        bool, typer.Option(help="Draw the figures of `report` for the card (needs matplotlib).")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="Lay out what would be pushed and print the card, no more.")
    ] = False,
    card: Annotated[Path | None, typer.Option(help="With --dry-run: write the card to this file instead.")] = None,
) -> None:
    """Pushes a run to the Hub: average and student, processor, plan, metrics, figures and a model card.

    Also pushes a data set that `hf-ema-scaling label` wrote. The token is that of HF_TOKEN or `hf auth login`.
    """
    from hf_ema_scaling import hub
    from hf_ema_scaling.report import draw_figures

    try:
        draw = draw_figures if figures else None
        details = hub.CardDetails(
            title, tuple(language or ()), license, tuple(dataset or ()), base_model, tuple(tag or ()), limits
        )
        if dry_run:
            folder = tempfile.mkdtemp(prefix="hf-ema-scaling-")
            written = hub.stage(run, folder, repo_id=repo_id, hub_weights=hub_weights, details=details, draw=draw)
            if card is None:
                typer.echo(written.read_text(encoding="utf-8"))
            else:
                card.parent.mkdir(parents=True, exist_ok=True)
                card.write_bytes(written.read_bytes())
            typer.echo(f"Nothing was sent. What would be pushed: {folder}", err=True)
            return
        if card is not None:
            raise typer.BadParameter("goes with --dry-run", param_hint="--card")
        if repo_id is None:
            raise typer.BadParameter("where to? OWNER/NAME on the Hub", param_hint="--repo_id")
        more: dict[str, Any] = {"private": private, "revision": revision, "details": details, "draw": draw}
        commit = hub.push(run, repo_id, hub_weights=hub_weights, **more)
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"{error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{commit.repo_url} is at {commit.oid}")


if __name__ == "__main__":
    main()
