"""Defects of `tests/DEFECTS.md` put in by hand, one at a time: a test that their row names fails, and says why itself.

Row 20, an average that does nothing, is in `test_published_checks.py`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_ema_scaling import EMACallback
from hf_ema_scaling.data.collator import TwoSourceDataset
from hf_ema_scaling.data.label_pool import PooledPasses
from hf_ema_scaling.data.passes import Passes
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.ema import EMATeacher, WeightAverage, average, frozen, names, shadow, swap
from hf_ema_scaling.ema.kernels import Pairs
from hf_ema_scaling.ema.names import Entry, entries_of, local_shard
from hf_ema_scaling.ema.shadow import Shadow
from hf_ema_scaling.ema.skipped import SkipWatch
from hf_ema_scaling.labels import PseudoLabel, ctc, seq2seq
from hf_ema_scaling.labels.cache import LabelCacheError
from hf_ema_scaling.labels.score_filters import Confidence
from hf_ema_scaling.labels.text_filters import LongWord
from hf_ema_scaling.training import callback, checkpoints, saved_run, trainer
from hf_ema_scaling.training.average_update import AverageMover
from hf_ema_scaling.training.averaged_steps import AveragedSteps
from hf_ema_scaling.training.cached_labels import CachedLabels
from hf_ema_scaling.training.collapse_watch import CollapseWatch
from hf_ema_scaling.training.evaluation import BothWeightsEvaluation
from hf_ema_scaling.training.flow import AverageUpdate
from hf_ema_scaling.training.forward_state import ForwardState
from hf_ema_scaling.training.hidden import split_off
from hf_ema_scaling.training.skipped_steps import SkippedSteps
from hf_ema_scaling.training.split_step import SplitSteps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = (ROOT / "tests/DEFECTS.md").read_text(encoding="utf-8").splitlines()
Patch = pytest.MonkeyPatch

# ---- Arithmetic and dtype


def tied_weights_move_twice(patch: Patch) -> None:
    """A `state_dict` has a tied tensor under each of its names."""
    blend = WeightAverage.blend

    def by_name(self: WeightAverage, model: nn.Module, weight: float, **more: Any) -> None:
        blend(self, model, weight, **more)
        for name, value in model.state_dict().items():
            key = self.resolve(name)
            if key is not None and key != name:
                self.tensors()[key].lerp_(value, weight)

    patch.setattr(WeightAverage, "blend", by_name)


def integers_are_averaged(patch: Patch) -> None:
    blend = WeightAverage.blend

    def of_all(self: WeightAverage, model: nn.Module, weight: float, **more: Any) -> None:
        before = {name: t.clone() for name, t in self.tensors().items() if t.dtype == torch.int64}
        blend(self, model, weight, **more)
        for name, old in before.items():
            now = self.tensors()[name]
            now.copy_(old.float() * (1 - weight) + now.float() * weight)

    patch.setattr(WeightAverage, "blend", of_all)


def the_shadow_has_the_dtype_of_the_weights(patch: Patch) -> None:
    patch.setattr(Shadow, "dtype_of", lambda self, entry: entry.tensor.dtype)


def one_kernel_for_all_dtypes(patch: Patch) -> None:
    def lerp_(self: Pairs, weight: float, *, away: bool = False) -> None:
        torch._foreach_lerp_(self.shadow, self.source, weight)

    patch.setattr(Pairs, "lerp_", lerp_)


def an_update_has_the_momentum_of_one_step(patch: Patch) -> None:
    after_step = AverageMover.after_step

    def forgets(self: AverageMover, *args: Any, **kwargs: Any) -> float | None:
        self.pending = 0.0
        return after_step(self, *args, **kwargs)

    patch.setattr(AverageMover, "after_step", forgets)


def adapters_are_averaged_from_zero(patch: Patch) -> None:
    patch.setattr(average, "debiased", lambda weight, gathered: (weight, gathered + (1 - gathered) * weight))


def a_constructor_computes_with_what_was_not_given(patch: Patch) -> None:
    """As `EMA(half_life=None, smoothing=0.99)` does elsewhere."""
    init = EMACallback.__init__

    def converts(self: EMACallback, momentum: float | None = None, *, half_life: Any = None, **more: Any) -> None:
        batches = half_life / more["reference_batch_size"]
        init(self, 0.5 ** (1 / batches) if momentum is None else momentum, **more)

    patch.setattr(EMACallback, "__init__", functools.wraps(init)(converts))


# ---- When the update happens


def an_update_per_micro_batch(patch: Patch) -> None:
    counted = EMACallback.on_substep_end

    def on_substep_end(self: EMACallback, *args: Any, **kwargs: Any) -> None:
        self.average.update(kwargs["model"], self.momentum, self.kappa)
        counted(self, *args, **kwargs)

    patch.setattr(EMACallback, "on_substep_end", on_substep_end)


def a_misspelt_hook(patch: Patch) -> None:
    patch.setattr(AverageUpdate, "on_step_optimizer", AverageUpdate.on_optimizer_step, raising=False)
    patch.delattr(AverageUpdate, "on_optimizer_step")


def skipped_steps_are_not_noticed(patch: Patch) -> None:
    patch.setattr(SkipWatch, "was_skipped", lambda self, optimizer: False)


def a_skipped_step_restores_batch_norm_alone(patch: Patch) -> None:
    restore = ForwardState.restore

    def some(self: ForwardState) -> None:
        self._kept = [kept for kept in self._kept if isinstance(kept[0], nn.modules.batchnorm._BatchNorm)]
        restore(self)

    patch.setattr(ForwardState, "restore", some)


def skipped_steps_are_not_counted(patch: Patch) -> None:
    patch.setattr(SkippedSteps, "skipped", lambda self, number, clock, why: None)


def nothing_happens_before_ema_start(patch: Patch) -> None:
    update = WeightAverage.update

    def waits(self: WeightAverage, model: nn.Module, momentum: float, kappa: float = 1.0) -> None:
        if momentum:
            update(self, model, momentum, kappa)

    patch.setattr(WeightAverage, "update", waits)


def the_teacher_labels_in_the_mode_it_is_in(patch: Patch) -> None:
    def apply(self: EMATeacher, function: Any, *args: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return function(self.module, *args, **inputs)

    patch.setattr(EMATeacher, "apply", apply)


# ---- Evaluate, save, resume


def only_the_first_set_sees_the_average(patch: Patch) -> None:
    swapped, seen = WeightAverage.swapped, set[int]()

    def once(self: WeightAverage, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        if self.num_updates in seen:
            return contextlib.nullcontext()
        seen.add(self.num_updates)
        return swapped(self, model)

    patch.setattr(WeightAverage, "swapped", once)


def an_exception_leaves_the_average_in_the_student(patch: Patch) -> None:
    @contextlib.contextmanager
    def without_finally(model: nn.Module, entries: list[Entry], write: Any, reshard: Any) -> Iterator[None]:
        own = [entry.tensor.detach().clone() for entry in entries]
        write()
        yield
        with torch.no_grad():
            for entry, value in zip(entries, own, strict=True):
                entry.tensor.copy_(value)

    patch.setattr(average, "swapped_in", without_finally)


def only_the_whole_counts_as_swapped(patch: Patch) -> None:
    patch.setattr(swap._Swap, "reaches", lambda self, part: part is next(iter(self.parts.values())))


def the_best_model_is_the_student(patch: Patch) -> None:
    patch.setattr(BothWeightsEvaluation, "_load_best_model", Trainer._load_best_model)


def the_average_is_saved_in_on_save(patch: Patch) -> None:
    """Which Trainer calls after the push."""
    save, waiting = saved_run.save_average, list[Callable[[], None]]()

    def on_save(self: Any, *args: Any, **kwargs: Any) -> None:
        while waiting:
            waiting.pop()()

    patch.setattr(saved_run, "save_average", lambda *args, **more: waiting.append(lambda: save(*args, **more)))
    patch.setattr(AverageUpdate, "on_save", on_save)


def resuming_starts_the_average_anew(patch: Patch) -> None:
    patch.setattr(saved_run, "restored_average", lambda trainer, checkpoint: trainer.ensure_average())


def tensors_are_paired_in_order(patch: Patch) -> None:
    def match(self: Shadow, model: nn.Module, *, whole: bool = False) -> list[Entry]:
        return [Entry(key, entry.slots) for key, entry in zip(self, entries_of(model), strict=False)]

    patch.setattr(Shadow, "match", match)


def names_that_miss_are_passed_over(patch: Patch) -> None:
    for module in (names, shadow, average):
        patch.setattr(module, "canonical_name", lambda name: name)
    patch.setattr(shadow, "check_names", lambda wanted, found, where, advice="": None)


def partitioned_weights_are_averaged(patch: Patch) -> None:
    refuse = callback.refuse_unsupported
    patch.setattr(
        callback, "refuse_unsupported", lambda args, model, optimizer: refuse(args, nn.Identity(), optimizer)
    )


def shards_are_taken_to_be_even(patch: Patch) -> None:
    """The whole shape is what `from_local` computes from the shard of each process."""

    def owned_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        copy = local_shard(tensor).detach().to(dtype, copy=True)
        if isinstance(tensor, DTensor):
            return DTensor.from_local(copy, tensor.device_mesh, tensor.placements, run_check=False)
        return copy

    patch.setattr(frozen, "owned_copy", owned_copy)
    in_launched_processes(patch, "shards_are_taken_to_be_even")


def shards_are_not_put_back(patch: Patch) -> None:
    patch.setattr(average, "reshard", lambda model: None)
    in_launched_processes(patch, "shards_are_not_put_back")


def in_launched_processes(patch: Patch, defect: str) -> None:
    """Puts the defect into the processes that the test launches, too."""
    start = launch._start

    def planted(command: list[str], environment: dict[str, str]) -> Any:
        return start([command[0], str(ROOT / "tests/models/planted.py"), defect, *command[1:]], environment)

    patch.setattr(launch, "_start", planted)


def a_flipped_bit_of_a_shard_is_loaded(patch: Patch) -> None:
    patch.setattr(checkpoints, "checksum_faults", lambda folder: [])


def workers_of_evaluations_die_of_the_signal(patch: Patch) -> None:
    patch.setattr(callback, "shield_evaluations", lambda state: None)


# ---- Pseudo-labels


def the_unlabelled_loss_is_constant(patch: Patch) -> None:
    loss = SplitSteps.micro_batch_loss

    def detached(self: SplitSteps, model: nn.Module, micro_batch: Any) -> Tensor:
        found = loss(self, model, micro_batch)
        return found.detach() + 0 * found if micro_batch["source"] == UNLABELLED else found

    patch.setattr(SplitSteps, "micro_batch_loss", detached)


def the_update_rebinds_a_local_name(patch: Patch) -> None:
    def lerp_(self: Pairs, weight: float, *, away: bool = False) -> None:
        for moved, source in zip(self.shadow, self.source, strict=True):
            moved = weight * source + (1 - weight) * moved

    patch.setattr(Pairs, "lerp_", lerp_)


def making_a_teacher_zeroes_the_student(patch: Patch) -> None:
    init = EMATeacher.__init__

    def zero(self: EMATeacher, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, model, *args, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    patch.setattr(EMATeacher, "__init__", zero)


def hidden_columns_are_handed_on(patch: Patch) -> None:
    patch.setattr(TwoSourceDataset, "visible", lambda self, kind, row: dict(row))


def blanks_are_dropped_first(patch: Patch) -> None:
    def collapse(best: Tensor, frame_lengths: Tensor, dropped: Tensor) -> list[list[int]]:
        rows = []
        for row, length in zip(best, frame_lengths.tolist(), strict=True):
            kept = row[:length][~torch.isin(row[:length], dropped)]
            rows.append(torch.unique_consecutive(kept).tolist())
        return rows

    patch.setattr(ctc, "_collapse", collapse)


def every_relabelling_begins_the_data_anew(patch: Patch) -> None:
    following = PooledPasses._next_pass

    def restarted(self: PooledPasses, batch: float, begun: float) -> Any:
        self.fresh = Passes(self.source, self.kind, self.seed, self.bucket_window)
        return following(self, batch, begun)

    patch.setattr(PooledPasses, "_next_pass", restarted)


def the_cache_is_lost_on_resume(patch: Patch) -> None:
    init = CachedLabels.__init__
    patch.setattr(
        CachedLabels, "__init__", lambda self, sampler, accelerator, checkpoint: init(self, sampler, accelerator)
    )


def the_age_of_labels_is_not_counted(patch: Patch) -> None:
    count = CachedLabels._count

    def ageless(self: CachedLabels, *args: Any) -> None:
        count(self, *args)
        self.counts["age"] = 0.0

    patch.setattr(CachedLabels, "_count", ageless)


def frames_of_padding_are_decoded(patch: Patch) -> None:
    lengths = ctc.ctc_frame_lengths
    patch.setattr(ctc, "ctc_frame_lengths", lambda model, batch: torch.full_like(n := lengths(model, batch), n.max()))


def dropped_steps_move_the_average(patch: Patch) -> None:
    update = AveragedSteps.update_average

    def always(self: AveragedSteps) -> None:
        self._skipped = False
        update(self)

    patch.setattr(AveragedSteps, "update_average", always)


def a_filter_expects_a_word(patch: Patch) -> None:
    patch.setattr(LongWord, "drops", lambda self, row: max(len(word) for word in row.words) > self.maximum)


def a_stop_flag_is_taken_back(patch: Patch) -> None:
    on_step_end = CollapseWatch.on_step_end

    def forgets(self: CollapseWatch, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= state.max_steps
        return on_step_end(self, args, state, control, **kwargs)

    patch.setattr(CollapseWatch, "on_step_end", forgets)


def the_truth_stays_in_the_data(patch: Patch) -> None:
    patch.setattr(trainer, "split_off", lambda dataset, column: (dataset, split_off(dataset, column)[1]))


def labels_lose_their_prompt(patch: Patch) -> None:
    """As what `generate` of Whisper returns has."""
    label = seq2seq.generated_label

    def without(target: Sequence[int], *, text: Sequence[int], **more: Any) -> PseudoLabel:
        begin = target.index(text[0]) if text else 0
        return label(target[begin:], text=text, **more)

    patch.setattr(seq2seq, "generated_label", without)


def what_is_below_the_threshold_is_kept(patch: Patch) -> None:
    patch.setattr(Confidence, "drops", lambda self, row: row.label.confidence >= self.minimum)


def every_micro_batch_counts_as_a_step(patch: Patch) -> None:
    label, loss = SplitSteps.label_micro_batches, SplitSteps.micro_batch_loss

    def counted(self: Any, inputs: Any) -> Any:
        found = label(self, inputs)
        self.micro_batch_count = len(found)
        return found

    patch.setattr(SplitSteps, "label_micro_batches", counted)
    patch.setattr(SplitSteps, "micro_batch_loss", lambda self, *args: loss(self, *args) * self.micro_batch_count)


# ---- Models


def frozen_layers_are_copied(patch: Patch) -> None:
    patch.setattr(frozen, "may_refer", lambda tensor, *, adapters: False)


def singular_vectors_are_averaged(patch: Patch) -> None:
    patch.setattr(average, "unit_vectors", lambda model: set())


@dataclass(frozen=True)
class Mutant:
    """A defect, and the test that must fail on it.

    `row` begins the row of DEFECTS.md. `ends` is how the test fails if not by an assertion.
    """

    row: str
    plant: Callable[[Patch], None]
    test: str
    ends: type[BaseException] | tuple[type[BaseException], ...] = AssertionError


MUTANTS = [
    Mutant("1. ", tied_weights_move_twice, "ema/test_average.py::test_tied_weight_moves_once"),
    Mutant("2. ", integers_are_averaged, "ema/test_average.py::test_integer_buffers_are_bit_exact"),
    Mutant("3. ", the_shadow_has_the_dtype_of_the_weights,
           "ema/test_average.py::test_half_precision_model_does_not_freeze_the_average"),
    Mutant("4. ", one_kernel_for_all_dtypes, "ema/test_average.py::test_random_steps_follow_the_closed_form",
           RuntimeError),
    Mutant("5. ", an_update_has_the_momentum_of_one_step,
           "training/test_ema_variants.py::test_an_update_every_three_steps_has_the_momentum_of_three[1.0]"),
    Mutant("6. ", adapters_are_averaged_from_zero,
           "models/test_adapters.py::test_the_delta_of_a_constant_student_is_the_students_from_the_first_update[10]"),
    Mutant("7. ", a_constructor_computes_with_what_was_not_given,
           "test_documented_calls.py::test_its_arguments_exist_and_literal_ones_are_accepted", TypeError),
    Mutant("8. ", an_update_per_micro_batch, "models/test_published_checks.py::test_keras_with_any_accumulation[4]"),
    Mutant("9. ", a_misspelt_hook, "models/test_published_checks.py::test_steps_at_which_the_average_moves"),
    Mutant("10. ", skipped_steps_are_not_noticed,
           "training/test_loss_scaling.py::test_the_trainer_moves_no_average_when_a_step_is_skipped"),
    Mutant("a skipped step leaves", a_skipped_step_restores_batch_norm_alone,
           "training/test_checks.py::test_a_skipped_step_leaves_nothing_of_what_its_forward_passes_wrote[False]"),
    Mutant("every step is skipped", skipped_steps_are_not_counted,
           "training/test_checks.py::test_too_many_skipped_steps_in_a_row_end_the_run[bad2-3]"),
    Mutant("11. ", nothing_happens_before_ema_start,
           "training/test_callback.py::test_before_ema_start_the_average_is_the_student"),
    Mutant("12. ", the_teacher_labels_in_the_mode_it_is_in, "ema/test_teacher.py::test_training_mode_is_refused"),
    Mutant("13. ", only_the_first_set_sees_the_average,
           "training/test_mixin.py::test_every_set_is_scored_with_student_and_average"),
    Mutant("13. ", an_exception_leaves_the_average_in_the_student,
           "training/test_mixin.py::test_an_exception_in_an_evaluation_leaves_the_students_bits[2]"),
    Mutant("an average of a part", only_the_whole_counts_as_swapped,
           "ema/test_average.py::"
           "test_a_part_of_what_is_swapped_is_refused_and_so_is_what_has_a_part_that_is[]", pytest.fail.Exception),
    Mutant("14. ", the_best_model_is_the_student,
           "training/test_mixin.py::test_the_best_model_scores_exactly_the_best_metric[eval_ema_loss]"),
    Mutant("15. ", the_average_is_saved_in_on_save,
           "models/test_published_checks.py::test_what_is_pushed_of_a_checkpoint_has_the_average", OSError),
    Mutant("16. ", resuming_starts_the_average_anew,
           "training/test_run_state.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit[supervised-4]"),
    Mutant("17. ", tensors_are_paired_in_order, "ema/test_average.py::test_names_decide_and_not_order"),
    Mutant("18. ", names_that_miss_are_passed_over, "ema/test_average.py::test_wrappers_are_seen_through"),
    Mutant("19. ", partitioned_weights_are_averaged,
           "training/test_callback.py::test_what_is_not_supported_is_refused"),
    Mutant("19. ", shards_are_taken_to_be_even,
           "distributed/test_fsdp.py::test_uneven_and_empty_shards_move_as_the_whole_does[fp32]"),
    Mutant("19. ", shards_are_not_put_back,
           "distributed/test_fsdp.py::test_swapped_weights_are_what_the_model_computes_with"),
    Mutant("a flipped bit", a_flipped_bit_of_a_shard_is_loaded,
           "training/test_checkpoints.py::test_shards_that_accelerate_writes_are_verified[missing]", ValueError),
    Mutant("a SIGTERM to the process group", workers_of_evaluations_die_of_the_signal,
           "training/test_callback_runs.py::test_so_it_does_where_the_workers_of_an_evaluation_are[False]",
           (OSError, RuntimeError)),
    Mutant("21. ", the_unlabelled_loss_is_constant,
           "training/test_trainer.py::test_the_unlabelled_loss_enters_the_gradient_by_its_weight"),
    Mutant("22. ", the_update_rebinds_a_local_name, "ema/test_average.py::test_keras_sequence"),
    Mutant("23. ", making_a_teacher_zeroes_the_student,
           "ema/test_teacher.py::test_creating_a_teacher_touches_nothing"),
    Mutant("24. ", hidden_columns_are_handed_on,
           "data/test_collator.py::test_labels_of_unlabelled_rows_are_never_present"),
    Mutant("25. ", blanks_are_dropped_first,
           "labels/test_ctc.py::test_repeats_are_merged_before_blanks_are_dropped"),
    Mutant("25. ", every_relabelling_begins_the_data_anew,
           "training/test_label_cache.py::"
           "test_one_iterator_serves_the_run_and_each_relabelling_goes_on_where_the_last_one_ended[1.0]"),
    Mutant("25. ", the_cache_is_lost_on_resume,
           "training/test_label_cache.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit[9]",
           LabelCacheError),
    Mutant("26. ", frames_of_padding_are_decoded,
           "labels/test_ctc_heads.py::test_a_padded_batch_has_the_golden_labels_of_its_rows"),
    Mutant("27. ", dropped_steps_move_the_average,
           "training/test_checks.py::test_skip_moves_nothing_but_the_clock[adamw_torch-nan]"),
    Mutant("28. ", a_filter_expects_a_word,
           "labels/test_filters.py::test_no_filter_stumbles_over_an_empty_text", ValueError),
    Mutant("28. ", a_stop_flag_is_taken_back,
           "training/test_flow.py::test_whoever_raises_the_stop_flag_is_heard_at_that_step[on_step_end-2]"),
    Mutant("29. ", the_truth_stays_in_the_data,
           "training/test_filtered_runs.py::test_the_hidden_truth_changes_its_own_diagnostic_and_nothing_else"),
    Mutant("29. ", labels_lose_their_prompt,
           "labels/test_generated_labels.py::test_a_label_is_what_a_greedy_loop_without_cache_or_padding_finds[whisper]"),
    Mutant("30. ", what_is_below_the_threshold_is_kept,
           "labels/test_filters.py::test_what_is_dropped_and_what_is_just_kept"),
    Mutant("31. ", every_micro_batch_counts_as_a_step,
           "invariance/test_splits.py::"
           "test_gradient_weights_and_average_do_not_depend_on_micro_batches[adamw_torch-bert]"),
    Mutant("labels stay in a cache", the_age_of_labels_is_not_counted,
           "training/test_label_cache.py::test_labels_used_are_those_made_when_their_item_entered[None-8.0]"),
    Mutant("frozen layers are copied", frozen_layers_are_copied,
           "models/test_frozen.py::test_frozen_layers_are_not_copied_and_the_average_is_a_whole_model"),
    Mutant("singular vectors", singular_vectors_are_averaged,
           "models/test_parametrizations.py::test_singular_vectors_that_turn_round_do_not_spoil_the_norm"),
]  # fmt: skip


@dataclass
class Verdict:
    """A pytest plugin: how the tests of a session ended."""

    ends: list[type[BaseException]] = field(default_factory=list)
    passed: int = 0

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None:
            self.ends.append(call.excinfo.type)
        elif call.when == "call":
            self.passed += 1


def session(test: str) -> tuple[Verdict, str]:
    """Runs tests in a pytest session inside this one; how they ended and what pytest wrote."""
    verdict, output = Verdict(), io.StringIO()
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler", "--capture=no"]
    place = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests" / test)]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main([*options, *place], plugins=[verdict])
    return verdict, output.getvalue()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.plant.__name__)
def test_a_test_that_the_row_names_fails(mutant: Mutant) -> None:
    (row,) = (row for row in ROWS if row.startswith(f"| {mutant.row}"))
    assert f"`tests/{mutant.test.partition('[')[0]}`" in row
    with pytest.MonkeyPatch.context() as patch:
        mutant.plant(patch)
        verdict, output = session(mutant.test)
    # Not by an error of the mutant's own: it is the test that notices.
    wanted = (mutant.ends, pytest.fail.Exception)
    assert verdict.ends and all(issubclass(end, wanted) for end in verdict.ends), output[-4000:]


def test_tests_pass_in_such_a_session_when_there_is_no_defect() -> None:
    verdict, output = session("ema/test_average.py::test_keras_sequence")
    assert (verdict.passed, verdict.ends) == (1, []), output[-4000:]


def test_all_rows_of_published_defects_have_a_mutant() -> None:
    rows = {int(found[1]) for mutant in MUTANTS if (found := re.match(r"(\d+)\. ", mutant.row))}
    assert rows == set(range(1, 32)) - {20}
