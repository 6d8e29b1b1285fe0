"""Checks of a trainer before it trains: data, labels, a gradient that ignores how batches are split, teacher, plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from hf_ema_scaling.data.collator import MicroBatch, MicroBatchCollator
from hf_ema_scaling.data.sampler import Draw
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.data.streaming import StreamHead, is_stream
from hf_ema_scaling.ema import EMATeacher, WeightAverage, check_before_labelling
from hf_ema_scaling.labels.decoder import with_decoder_start
from hf_ema_scaling.training.checks import check_ctc_targets, gradient_difference, gradients
from hf_ema_scaling.training.mixin import EMATrainerMixin

PASSED, WARNING, FAILED, SKIPPED = "passed", "warning", "failed", "skipped"
ROWS_OF_A_SPLIT = 8
SPLIT_TOLERANCE = {False: 1e-3, True: 5e-2}
"""Relative difference of gradients that rounding explains, in full precision and under mixed precision."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    name: str
    result: str
    """passed, warning, failed or skipped."""
    detail: str


def self_check(build: Callable[[], EMATrainerMixin], *, rows: int = 256) -> list[CheckResult]:
    """Builds a trainer and checks it; whatever goes wrong is a result, not an exception.

    Args:
        build: makes the trainer, data included.
        rows: how many rows of each data set are looked at.
    """
    made: list[EMATrainerMixin] = []

    def recipe() -> tuple[str, str]:
        made.append(build())
        return PASSED, f"{type(made[0]).__name__} on {type(made[0].model).__name__}, {parameters(made[0])}"

    results = [_checked("recipe", recipe)]
    for trainer in made:
        results += [
            _checked("data", partial(check_data, trainer, rows)),
            _checked("labels", partial(check_labels, trainer, rows)),
            _checked("split", partial(check_split, trainer)),
            _checked("teacher", partial(check_teacher, trainer)),
            _checked("plan", partial(check_plan, trainer)),
        ]
    return results


def _checked(name: str, check: Callable[[], tuple[str, str]]) -> CheckResult:
    try:
        return CheckResult(name, *check())
    except Exception as error:
        return CheckResult(name, FAILED, f"{type(error).__name__}: {error}")


def parameters(trainer: EMATrainerMixin) -> str:
    """The size of the model, for people."""
    return f"{sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6:.2f} M parameters"


def check_data(trainer: EMATrainerMixin, rows: int) -> tuple[str, str]:
    """The first `rows` rows of every data set can be read, collated, and are finite."""
    unlabelled, _ = trainer.unlabelled_data()
    # Collators see the columns that a run gives them: not, for one, where a row comes from.
    seen, kinds = trainer.run_dataset(), {"labelled": LABELLED, "unlabelled": UNLABELLED}
    evaluation = trainer.eval_dataset
    sets: dict[str, Any] = {"labelled": trainer.train_dataset, "unlabelled": unlabelled}
    sets |= evaluation if isinstance(evaluation, dict) else {"evaluation": evaluation}
    found = []
    for name, dataset in sets.items():
        if dataset is None:
            continue
        by_number, count = _at_hand(dataset, rows, name)
        for first in range(0, count, ROWS_OF_A_SPLIT):
            picked = range(first, min(first + ROWS_OF_A_SPLIT, count))
            try:
                found_rows = [by_number[row] for row in picked]
                if name in kinds:
                    found_rows = [seen.visible(kinds[name], row) for row in found_rows]
                trainer.data_collator([dict(row) for row in found_rows])
            except Exception as error:
                raise ValueError(f"{name} rows {picked[0]} to {picked[-1]}: {error}") from error
        if is_stream(dataset):
            found.append(f"{name} a stream (its first {count} rows looked at)")
            continue
        columns = list(getattr(dataset, "column_names", None) or [])
        column = trainer.args.duration_column
        notes = [f"{sum(dataset[column][:]) / 60:.1f} min"] if column in columns else []
        notes += [f"the first {rows} looked at"] if len(dataset) > rows else []
        found.append(f"{name} {len(dataset)} rows" + (f" ({', '.join(notes)})" if notes else ""))
    return PASSED, ", ".join(found)


def check_labels(trainer: EMATrainerMixin, rows: int) -> tuple[str, str]:
    """CTC: the labels of the first `rows` labelled rows are not empty and fit the frames of their audio."""
    if not trainer.ctc:
        return SKIPPED, f"{type(trainer.model).__name__} is no CTC model"
    dataset, count = _at_hand(trainer.train_dataset, rows, "labelled")
    for first in range(0, count, ROWS_OF_A_SPLIT):
        indices = list(range(first, min(first + ROWS_OF_A_SPLIT, count)))
        check_ctc_targets(trainer.model, trainer.data_collator([dict(dataset[row]) for row in indices]), indices)
    total = f"the first {count}" if is_stream(trainer.train_dataset) else f"{count} of {len(dataset)}"
    return PASSED, f"the labels of {total} rows fit their frames"


def _at_hand(dataset: Any, rows: int, name: str) -> tuple[Any, int]:
    """The data set by row number, and how many of its first `rows` rows there are."""
    if not is_stream(dataset):
        return dataset, min(rows, len(dataset))
    head = StreamHead(dataset, name)
    return head, head.at_most(rows)


def check_split(trainer: EMATrainerMixin) -> tuple[str, str]:
    """The gradient of the first labelled rows of the run is the same for one micro-batch and for smaller ones.

    Dropout is off and BatchNorm normalises by its running statistics, which is where equality is claimed.
    Augmentation is on from its start: it is seeded by position, not by micro-batch.
    """
    size = min(ROWS_OF_A_SPLIT, trainer.args.per_device_train_batch_size)
    draws = [draw for draw in trainer.sampler.draws(0, 0) if draw.source == LABELLED and draw.weight][:size]
    if len(draws) < 2:
        return SKIPPED, f"a micro-batch has {len(draws)} labelled rows (per_device_train_batch_size): nothing to split"
    whole = _gradients(trainer, draws, len(draws))
    difference = max(gradient_difference(whole, _gradients(trainer, draws, part)) for part in {1, len(draws) // 2})
    tolerance = SPLIT_TOLERANCE[trainer.args.bf16 or trainer.args.fp16]
    detail = f"{len(draws)} rows in 1 or {len(draws)} micro-batches: gradients differ by {difference:.1e}"
    if trainer.batch_statistics:
        detail += " (BatchNorm on its running statistics; its micro-batches are the same at every kappa)"
    if difference <= tolerance:
        return PASSED, detail
    if not math.isfinite(difference):
        return FAILED, "the gradient is not finite: do the labels fit their frames?"
    padded = gradient_difference(whole, _gradients(trainer, draws, 1, same_width=True))
    if padded <= tolerance:
        return WARNING, f"{detail}, but only {padded:.1e} at equal padding: this model sees padding; use bucket_window"
    return FAILED, f"{detail}, above {tolerance:g}: example_loss, collator or model mix the rows of a micro-batch"


def _gradients(trainer: EMATrainerMixin, draws: list[Draw], part: int, same_width: bool = False) -> dict[str, Tensor]:
    """Gradient of the sum of the example losses of `draws`, taken in micro-batches of `part` rows."""
    model = trainer.model
    dataset = trainer.run_dataset()
    collate = MicroBatchCollator(trainer.data_collator)
    together: MicroBatch = collate([dataset[draw._replace(micro_batch=0)] for draw in draws])["micro_batches"][0]
    micro_batches = collate([dataset[draw._replace(micro_batch=i // part)] for i, draw in enumerate(draws)])
    was_training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    try:
        for number, micro_batch in enumerate(micro_batches["micro_batches"]):
            if same_width:
                rows = slice(number * part, (number + 1) * part)
                micro_batch["inputs"] = {name: value[rows] for name, value in together["inputs"].items()}
            trainer.accelerator.backward(trainer.micro_batch_loss(model, micro_batch))
        return gradients(model)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def check_teacher(trainer: EMATrainerMixin) -> tuple[str, str]:
    """The average follows the student, and a teacher over it says what the student would say, and changes with it."""
    average = WeightAverage(trainer.model, buffers=trainer.args.ema_buffers)  # type: ignore[arg-type]
    teacher = EMATeacher(trainer.model, average, factory=getattr(trainer, "teacher_factory", None))
    unlabelled, _ = trainer.unlabelled_data()
    source = LABELLED if unlabelled is None else UNLABELLED
    _, row = trainer.run_dataset()[Draw(source, 0, 0, 0, 1.0)]
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(row)]))
    hidden = ("labels", *trainer.columns_for_labeler())
    inputs = {name: value for name, value in inputs.items() if name not in hidden}
    inputs = with_decoder_start(trainer.model, inputs)
    check_before_labelling(trainer.model, average, teacher, inputs, autocast=trainer.accelerator.autocast)
    return PASSED, "its output is the student's with the same weights, and changes when the student does"


def check_plan(trainer: EMATrainerMixin) -> tuple[str, str]:
    """What the plan warns of."""
    assert trainer.layout is not None
    found = trainer.layout.warnings()
    steps = f"{trainer.sampler.num_steps} optimizer steps for {trainer.plan.recipe.max_steps:g} reference steps"
    return (WARNING, "; ".join(found)) if found else (PASSED, f"{steps}, no warnings")


def check_table(results: list[CheckResult]) -> str:
    """The results as people read them."""
    rows = [("check", "result", "detail"), *((found.name, found.result, found.detail) for found in results)]
    return "\n".join(f"{name:<8}  {result:<7}  {detail}" for name, result, detail in rows)
