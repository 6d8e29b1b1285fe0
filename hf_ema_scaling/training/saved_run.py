"""What a run saves of student and average, and how a resumed run takes it up."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ema_scaling.ema import save_average, unwrap
from hf_ema_scaling.ema.adapter_storage import load_added_adapter
from hf_ema_scaling.training.averaged_steps import AveragedSteps
from hf_ema_scaling.training.checkpoints import restored_average
from hf_ema_scaling.training.commit import committed
from hf_ema_scaling.training.evaluation import BothWeightsEvaluation
from hf_ema_scaling.training.records import write_records
from hf_ema_scaling.training.run_state import RunState
from hf_ema_scaling.training.sharded import adds_adapters_to_shards, check_optimizer_state, saved_as_whole
from hf_ema_scaling.training.streaming import save_places
from hf_ema_scaling.training.student_files import student_checksums


class SavedRun(BothWeightsEvaluation, AveragedSteps):
    """Saves student and average of `AveragedSteps` side by side, and resumes from what it saved."""

    run_record: dict[str, Any] | None = None
    """What `run.json` is to hold; None for what the trainer knows of how the program was started."""
    resume_random_state = True
    """Whether a resumed run draws the dropout masks of the run that was interrupted; False draws others."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student at the root of `output_dir`, the average in `ema/`; both before any push.

        Plan, metrics and `run.json` lie beside them, so that `hf-ema-scaling push` knows them; in a checkpoint, those
        of the run's folder count.
        """
        with self._as_student():
            super().save_model(output_dir, _internal_call=True)
        if self.average is not None:
            folder, state = Path(output_dir or self.args.output_dir or "."), self._run_state()
            if self.args.should_save:
                state.student = student_checksums(folder)
            saved: dict[str, Any] = {"state": state.to_dict(), "processing_class": self.processing_class}
            save_average(folder / "ema", self.model, self.average, write=self.args.should_save, **saved)
            if self.args.should_save and not _internal_call:
                write_records(self, folder=folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def counters(self) -> dict[str, Any]:
        """What is counted between logs, for the checkpoint; JSON values."""
        state = {"pending_log_momentum": self._mover.pending, "noise": self._noise.state_dict()}
        return {"clipped": self._clipped, "skipped": self._skips.state_dict(), **state}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore `counters()`; an empty dictionary starts them anew."""
        self._clipped = int(counters.get("clipped", 0))
        self._skips.load_state_dict(counters.get("skipped", {}))
        self._mover.pending = float(counters.get("pending_log_momentum", 0.0))
        self._noise.load_state_dict(counters.get("noise", {}))

    def _run_state(self) -> RunState:
        done = self.state.global_step
        running = self.is_in_train and hasattr(self, "_tr_loss")
        losses = self.accelerator.gather(self._tr_loss.reshape(1)) if running else torch.zeros(1)
        losses = losses.nan_to_num(0.0, 0.0, 0.0)
        return RunState(
            global_step=done,
            clock=float(self.sampler.stream.clock(int(self.sampler.positions[done]))),
            borders=self.sampler.done(done).to_json(),
            identity=self._laid_out().identity,
            recipe=asdict(self.plan.recipe),
            loss=float(losses.mean()),
            losses=losses.tolist(),
            last_logged=self._globalstep_last_logged if running else done,
            counters=self.counters(),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not adds_adapters_to_shards(self):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            with saved_as_whole(self.model) as adapters:
                super()._save(output_dir, adapters)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with committed(self, trial):
            super()._save_checkpoint(model, trial)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resume_random_state:
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_places(self._places, output_dir, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()  # no commit before every process has written its part

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_added_adapter(unwrap(self.model if model is None else model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        check_optimizer_state(self, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.average = restored_average(self, checkpoint)
