"""What is written down of the labels of a run: counts, the ledger, hidden errors, losses by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, ReferenceStream
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.ledger import Ledger
from hf_ema_scaling.training.diagnostics import Gather, LabelStatistics
from hf_ema_scaling.training.hidden import HiddenReferences, hidden_metrics
from hf_ema_scaling.training.label_counts import LabelCounts
from hf_ema_scaling.training.label_sources import Sources
from hf_ema_scaling.training.student_watch import StudentWatch, student_metrics

if TYPE_CHECKING:
    from hf_ema_scaling.training.trainer import PseudoLabelTrainer


class LabelRecord:
    """Counts on one process; reading them sums over processes.

    Args:
        unit: what units are.
        sources: where unlabelled rows come from.
        reasons: reasons that filters give.
        student: watches the student's losses.
        hidden: the truth, where it is known.
        seconds: durations of labelled and unlabelled rows; lengths are counted per second where both are known.
        tokens: of unlabelled rows; the ledger has seconds and tokens beside the unit where they are known.
        numbers: whether labels are the numbers of a regression.
        classes: whether a label is one class.
    """

    def __init__(
        self,
        unit: str,
        sources: Sources,
        *,
        reasons: Sequence[str],
        student: StudentWatch,
        hidden: HiddenReferences | None = None,
        seconds: tuple[NDArray[np.float64] | None, NDArray[np.float64] | None] = (None, None),
        tokens: NDArray[np.float64] | None = None,
        numbers: bool = False,
        classes: bool = False,
    ) -> None:
        self.statistics = LabelStatistics(reasons, student.drain, numbers=numbers, classes=classes)
        self._also = {
            name: known
            for name, known in (("seconds", seconds[1]), ("tokens", tokens))
            if known is not None and name != unit
        }
        self.own = Ledger(unit, tuple(self._also))
        self.ledger = Ledger(unit, tuple(self._also))
        """Of all processes, as of the last log, checkpoint or end of training."""
        self.sources = sources
        self.hidden = hidden
        labelled, unlabelled = seconds
        self._seconds = (labelled, unlabelled) if labelled is not None and unlabelled is not None else (None, None)

    def made(self, labels: Sequence[PseudoLabel], rows: Sequence[int], stream: ReferenceStream) -> None:
        """Labels as the teacher makes them and filters judge them."""
        self.statistics.add_made(labels)
        self._enter(self.own.made, labels, rows, stream)

    def used(self, labels: Sequence[PseudoLabel], rows: Sequence[int], stream: ReferenceStream) -> None:
        """Labels with which rows are trained on, or dropped."""
        self.statistics.add(labels)
        self._enter(self.own.used, labels, rows, stream)
        if self.hidden is not None:
            self.hidden.count(labels, rows, self.statistics.add_count)

    def _enter(self, book: Any, labels: Sequence[PseudoLabel], rows: Sequence[int], stream: ReferenceStream) -> None:
        places = np.asarray(rows, dtype=np.int64)
        units = stream.units_of(places.astype(np.int32)).tolist()
        others = [known[places].tolist() for known in self._also.values()]
        for source, label, *sizes in zip(self.sources.of(rows), labels, units, *others, strict=True):
            Ledger.add(book, source, [label.reason], *([size] for size in sizes))

    def gold(self, micro_batch: MicroBatch) -> None:
        """Labelled rows, as they are trained on."""
        labels = micro_batch["inputs"]["labels"]
        self.statistics.gold.add_targets(labels, self._milliseconds(LABELLED, micro_batch["indices"]))

    def targets(self, micro_batch: MicroBatch, labels: Sequence[PseudoLabel]) -> None:
        """Targets of pseudo-labels that are kept."""
        kept = [number for number, label in enumerate(labels) if label.kept]
        if kept:
            rows = [micro_batch["indices"][number] for number in kept]
            self.statistics.add_targets(micro_batch["inputs"]["labels"][kept], self._milliseconds(UNLABELLED, rows))

    def _milliseconds(self, kind: int, rows: Sequence[int]) -> int | None:
        seconds = self._seconds[kind]
        if seconds is None:
            return None
        return int(np.rint(1000 * seconds[np.asarray(rows, dtype=np.int64)]).sum())

    def logs(self, gather: Gather) -> dict[str, float]:
        """Metrics of all processes since the last call; of several sources also the ledger's items so far.

        These are `ledger/<source>/<outcome>`, where the outcome is `kept` or the reason of a drop.
        """
        self.total_ledger(gather)
        items: dict[str, float] = {}
        if len(self.sources.names) > 1:
            for source, reasons in self.ledger.used.items():
                items |= {f"ledger/{source}/{reason}": float(cell[0]) for reason, cell in reasons.items()}
        return {**_metrics(*self.statistics.take_log(gather)), **items}

    def window(self, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        """Counts and metrics of all processes since the window was emptied."""
        counts, metrics = self.statistics.take_window(gather)
        return counts, _metrics(counts, metrics)

    def stretch(self, gather: Gather) -> LabelCounts:
        """Numbers of all processes since the last call."""
        return self.statistics.take_stretch(gather)

    def total_ledger(self, gather: Gather) -> None:
        """Sum the ledger over processes."""
        self.ledger.load_state_dict(*gather(self.own.state_dict()))

    def state_dict(self, gather: Gather | None) -> dict[str, Any]:
        """All counts, of all processes where `gather` collects them."""
        if gather is not None:
            self.total_ledger(gather)
        return {"labels": self.statistics.state_dict(gather), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, main: bool) -> None:
        """Restore the counts; those of all processes go to the main one."""
        self.statistics.load_state_dict(state.get("labels", {}) if main else {})
        self.own.load_state_dict(state.get("ledger", {}) if main else {})
        self.ledger.load_state_dict(state.get("ledger", {}))


def _metrics(counts: LabelCounts, metrics: dict[str, float]) -> dict[str, float]:
    return {**metrics, **student_metrics(counts.counts), **hidden_metrics(counts.counts)}


class SaveLedger(TrainerCallback):
    """Writes `ledger.json` into `output_dir` when training ends."""

    def __init__(self, trainer: PseudoLabelTrainer) -> None:
        self.trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum over processes, and write."""
        self.trainer.record.total_ledger(self.trainer.gather)
        if args.should_save:
            self.trainer.ledger.save(str(args.output_dir))
