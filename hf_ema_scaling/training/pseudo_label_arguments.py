"""The arguments of pseudo-labelling: when, how much, and which labels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_ema_scaling.data.named_views import read_second_view
from hf_ema_scaling.labels.filters import read_filters
from hf_ema_scaling.training.argument_checks import one_of

COLLAPSE_ACTIONS = ("off", "warn", "stop", "rollback")


@dataclass
class PseudoLabelArguments:
    """When, how much and which pseudo-labels enter the loss; starts and lengths in reference steps.

    Args:
        pl_start: reference step at which unlabelled items begin.
        unlabeled_ratio: unlabelled units per labelled unit from then on, in stages of `batch_schedule` that do not
            state labelled and unlabelled sizes.
        unlabeled_weight: lambda, weight of a pseudo-labelled example's loss.
        min_confidence: pseudo-labels less confident than this are dropped (reason `confidence`): short for the filter
            `confidence`, after all others.
        filters: filters by name with their arguments (see `hf_ema_scaling.labels.filters.FILTERS`), as JSON or a
            mapping: `{"repeat": {}, "compression": {"maximum": 2.4}, "rate": "fit"}`. They judge a label when it is
            made, before it enters the label cache; the first one that fires gives the reason.
        second_view: a second view that the teacher labels, too, as JSON or a mapping of names to arguments (see
            `hf_ema_scaling.data.named_views.VIEWS`): `{"noise": {"probability": 1.0}}`. The filter `disagree` then
            judges by how much of a label it changes. Its random numbers come of a row's own content, so it is the same
            in every batch. For a regression it also needs `"scale"`, the difference that is total disagreement. It
            costs another forward pass of the teacher.
        align_labels: `all` or `source` for distribution alignment of labels of one class (`LabelAlignment`): the
            teacher's probabilities are shifted so that classes are as frequent as among labelled rows, over all
            unlabelled rows or in each source (`source_column`) by itself. For unlabelled data whose classes are about
            as frequent as those of the labelled set. None for labels as they are.
        weight_by_confidence: multiply each pseudo-label's weight by its confidence.
        max_unlabeled_loss: cap on the loss of one pseudo-labelled example (nats per target token), below
            `max_example_loss`. It is a function of the example alone, so it is the same at every kappa and in every
            split, which a cap relative to the mean of a batch would not be.
        pl_dropout: dropout probability of the student from `pl_start` on (slimIPL), wherever it has one above 0.
        teacher_dtype: float32, or bfloat16 or float16 for a teacher that labels with a copy of the average in half
            precision. At the start it is compared with a float32 teacher on up to 4 rows.
        label_batch_size: rows per forward pass of the teacher on each process; None for the student's micro-batches.
            It changes throughput and memory only: the rows of a step are collated once more for the teacher.
        pl_ramp: reference steps over which the weight of pseudo-labels rises linearly from 0 at `pl_start` to
            `unlabeled_weight`; 0 for the full weight at once.
        cache_steps: length of the label cache (slimIPL, arXiv 2010.11524): the unlabelled items of so many reference
            steps, with the labels they were given when they entered. 0 for labels that are made as items are drawn.
            The first `cache_steps` reference steps after `pl_start` fill it; from then on unlabelled items are drawn
            from it, each once per pass over it.
        cache_refresh: probability that an item is replaced by a new one, labelled at that moment, once it has been
            drawn. It is about items, so it does not change with kappa. A label is used 1 / `cache_refresh` times and
            is `cache_steps / cache_refresh` reference steps old when it is used, on average.
        cache_half_lives: mean age of the labels in use, in half-lives of the average, in the place of `cache_steps`,
            which is then `cache_half_lives * cache_refresh` half-lives. With a momentum schedule, half-lives are those
            of `ema_momentum`.
        source_column: column of the unlabelled set that says where each row comes from, for the ledger and for
            `align_labels`.
        hidden_reference_column: column of the unlabelled set with true texts, label ids, or what the labelled set has
            as labels. It is taken out of the data that training sees and looked up only to log the error of
            pseudo-labels (`hidden/*`, see `hidden_metrics`).
        calibration_rows: labelled rows that the teacher labels at each evaluation, to log its error and how far its
            confidence is from its accuracy (`calibration/*`); 0 for none.
        on_collapse: what to do when labels collapse (`signs_of_collapse`): warn; stop, with an error once training has
            ended in good order; rollback to the last checkpoint from before, and go on from there with pseudo-labels
            paused until the clock of the alarm and at half their weight from then on; or off. A teacher none of whose
            last 1000 labels is kept stops the run under `warn` and `off`, too.
        collapse_window: reference steps over which labels are judged.
    """

    pl_start: float = field(default=0.0, metadata={"help": "Reference step at which unlabelled items begin."})
    unlabeled_ratio: float = field(
        default=1.0, metadata={"help": "Unlabelled units per labelled unit from pl_start on."}
    )
    unlabeled_weight: float = field(
        default=1.0, metadata={"help": "Weight (lambda) of a pseudo-labelled example's loss."}
    )
    min_confidence: float = field(
        default=0.0, metadata={"help": "Drop pseudo-labels whose confidence is below this, in [0, 1]."}
    )

    teacher_dtype: str = field(
        default="float32",
        metadata={"help": "What the teacher labels in: float32, or a copy of it in bfloat16 or float16."},
    )
    label_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per forward pass of the teacher, per process; None: the student's micro-batches."},
    )
    pl_ramp: float = field(
        default=0.0, metadata={"help": "Reference steps over which unlabeled_weight is reached from 0 at pl_start."}
    )
    cache_steps: float = field(
        default=0.0,
        metadata={"help": "Reference steps whose unlabelled items make up the label cache; 0: labels are not kept."},
    )
    cache_refresh: float = field(
        default=0.1, metadata={"help": "Probability that an item of the label cache is replaced once it is drawn."}
    )
    filters: str | None = field(
        default=None,
        metadata={"help": 'Filters of pseudo-labels, as JSON: {"repeat": {}, "compression": {"maximum": 2.4}}.'},
    )
    second_view: str | None = field(
        default=None,
        metadata={
            "help": 'Another view for the teacher, for the filter disagree: {"token_masking": {"share": 0.1}} (JSON).'
        },
    )
    align_labels: str | None = field(
        default=None,
        metadata={"help": "Give labels the class shares of the labelled set: all, or each source by itself (source)."},
    )
    weight_by_confidence: bool = field(
        default=False, metadata={"help": "Weight each pseudo-label by its confidence, too."}
    )
    max_unlabeled_loss: float | None = field(
        default=None,
        metadata={"help": "Cap on one pseudo-labelled example's loss (nats per token); None: max_example_loss."},
    )
    pl_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the student from pl_start on; None: as before."}
    )
    cache_half_lives: float | None = field(
        default=None,
        metadata={"help": "Mean age of the labels in use, in half-lives of the average, instead of cache_steps."},
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Column of the unlabelled set by which the ledger is kept."}
    )
    hidden_reference_column: str | None = field(
        default=None, metadata={"help": "Column of the unlabelled set with the truth, for diagnostics alone."}
    )
    calibration_rows: int = field(
        default=0, metadata={"help": "Labelled rows that the teacher labels at each evaluation; 0 for none."}
    )
    on_collapse: str = field(default="warn", metadata={"help": "When labels collapse: off, warn, stop or rollback."})
    collapse_window: float = field(
        default=100.0, metadata={"help": "Reference steps over which pseudo-labels are judged for collapse."}
    )

    def __post_init__(self) -> None:
        if not self.pl_start >= 0:
            raise ValueError(f"pl_start must be at least 0, got {self.pl_start}")
        one_of("teacher_dtype", self.teacher_dtype, ("float32", "bfloat16", "float16"))
        if not self.unlabeled_ratio > 0:
            raise ValueError(f"unlabeled_ratio must be above 0, got {self.unlabeled_ratio}")
        if not self.unlabeled_weight >= 0:
            raise ValueError(f"unlabeled_weight must be at least 0, got {self.unlabeled_weight}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must lie in [0, 1], got {self.min_confidence}")
        if self.label_batch_size is not None and self.label_batch_size < 1:
            raise ValueError(f"label_batch_size must be at least 1 or None, got {self.label_batch_size}")
        if not 0 <= self.pl_ramp < math.inf:
            raise ValueError(f"pl_ramp must be a number of reference steps of at least 0, got {self.pl_ramp}")
        if self.cache_steps != 0 and not 1 <= self.cache_steps < math.inf:
            raise ValueError(
                f"cache_steps must be 0 (no cache) or at least 1 reference step, got {self.cache_steps}: a smaller "
                "pool would give the same item twice within a reference step"
            )
        if not 0 < self.cache_refresh <= 1:
            raise ValueError(
                f"cache_refresh must lie in (0, 1], got {self.cache_refresh}; for labels that are made anew at every "
                "draw set cache_steps=0"
            )
        if self.align_labels is not None:
            one_of("align_labels", self.align_labels, ("all", "source"))
        if self.align_labels == "source" and self.source_column is None:
            raise ValueError("align_labels=source aligns each source by itself: name their column by source_column")
        if self.filters is not None:
            if isinstance(self.filters, Mapping):
                self.filters = json.dumps(self.filters)
            read_filters(self.filters)
        if self.second_view is not None:
            if isinstance(self.second_view, Mapping):
                self.second_view = json.dumps(self.second_view)
            read_second_view(self.second_view)
        if self.max_unlabeled_loss is not None and not self.max_unlabeled_loss > 0:
            raise ValueError(f"max_unlabeled_loss must be above 0 or None, got {self.max_unlabeled_loss}")
        if self.pl_dropout is not None and not 0 <= self.pl_dropout < 1:
            raise ValueError(f"pl_dropout must lie in [0, 1) or be None, got {self.pl_dropout}")
        if self.cache_half_lives is not None:
            if not 0 < self.cache_half_lives < math.inf:
                raise ValueError(f"cache_half_lives must be above 0 or None, got {self.cache_half_lives}")
            if self.cache_steps != 0:
                raise ValueError(
                    f"give cache_steps or cache_half_lives, got {self.cache_steps:g} and {self.cache_half_lives:g}"
                )
        if self.calibration_rows < 0:
            raise ValueError(f"calibration_rows must be at least 0, got {self.calibration_rows}")
        one_of("on_collapse", self.on_collapse, COLLAPSE_ACTIONS)
        if not 0 < self.collapse_window < math.inf:
            raise ValueError(f"collapse_window must be above 0 reference steps, got {self.collapse_window}")

    def cache_length(self, half_life: float) -> float:
        """Length of the label cache in reference steps, 0 for none.

        Args:
            half_life: of the average, in reference steps.

        Raises:
            ValueError: where `cache_half_lives` makes a cache shorter than a reference step.
        """
        if self.cache_half_lives is None:
            return self.cache_steps
        steps = self.cache_half_lives * self.cache_refresh * half_life
        if not 1 <= steps < math.inf:
            raise ValueError(
                f"cache_half_lives={self.cache_half_lives:g} makes a cache of {steps:.3g} reference steps (half-life "
                f"{half_life:.3g}, cache_refresh {self.cache_refresh:g}), and it takes at least 1: choose more "
                "half-lives, or labels that are made as items are drawn"
            )
        return steps
