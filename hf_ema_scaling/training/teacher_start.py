"""The teacher as training begins: built in the dtype that was asked for, checked to say what the student would say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ema_scaling.ema import EMATeacher, WeightAverage, check_before_labelling, check_liveness, check_parity
from hf_ema_scaling.ema.teacher import HALF_PRECISION
from hf_ema_scaling.labels import Labeler
from hf_ema_scaling.labels.decoder import with_decoder_start
from hf_ema_scaling.training.pseudo_label_step import inputs_of_model

logger = logging.get_logger(__name__)

PARITY_ROWS = 4
"""Rows on which a half-precision teacher is compared with a float32 one."""


def start_teacher(
    model: nn.Module,
    average: WeightAverage,
    inputs: Mapping[str, Tensor],
    labeler: Labeler,
    *,
    dtype: str = "float32",
    factory: Callable[[], nn.Module] | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> EMATeacher:
    """Builds the teacher and tests it: it says what the student says with the same weights, and follows the average.

    In half precision a teacher in float32 is compared with the student, and the one in half precision with that.

    Args:
        model: the student.
        average: its average.
        inputs: a few unlabelled rows, collated, on the teacher's device.
        labeler: makes the labels that are compared; how many rows differ is logged.
        dtype: of the teacher's weights, by name.
        factory: as for `EMATeacher`.
        autocast: in which the student trains.

    Raises:
        DeadTeacherError: see `check_before_labelling` and `check_parity`.
    """
    teacher = EMATeacher(model, average, factory=factory, dtype=getattr(torch, dtype))
    half = teacher.dtype in HALF_PRECISION
    full = EMATeacher(model, average, factory=factory) if half else teacher
    forward = with_decoder_start(model, inputs_of_model(inputs, labeler))
    check_before_labelling(model, average, full, forward, autocast=autocast)
    if half:
        teacher.warned = True
        check_liveness(model, average, teacher, forward)
        difference = check_parity(teacher, full, forward)
        labels = [[label.ids for label in labeler.label(one, inputs)] for one in (full, teacher)]
        same = sum(a == b for a, b in zip(*labels, strict=True))
        # Rounding may tip a label: worth a word, not an error.
        say = logger.info if same == len(labels[0]) else logger.warning
        say(
            f"The teacher in {dtype} differs from one in float32 by {difference:.2g} of the size of its outputs; "
            f"{same} of {len(labels[0])} labels are the same."
        )
    return teacher
