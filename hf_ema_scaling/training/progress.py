"""What progress bars show of scaling: reference clock, kappa, momentum, and the share of pseudo-labels kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.scaling import ScalingPlan

if TYPE_CHECKING:
    from hf_ema_scaling.training.mixin import EMATrainerMixin


def step_values(plan: ScalingPlan, step: SampledStep, kept: float | None = None) -> dict[str, str]:
    """kappa and momentum of a step, and the share of pseudo-labels kept, for the end of a progress bar.

    Args:
        plan: of the run.
        step: what it drew.
        kept: share of pseudo-labels kept, as last logged; None where there are none.
    """
    values = {
        "kappa": f"{step.kappa:.3g}",
        "momentum": f"{math.exp(plan.log_momentum(step.start, step.end)):.5f}",
    }
    return values if kept is None else {**values, "kept": f"{kept:.0%}"}


class ScalingProgress(ProgressCallback):
    """Trainer's bars with the values of the step just done. Where stderr is no terminal there are no bars, only logs.

    Args:
        trainer: whose steps are shown.
        max_str_len: as for `ProgressCallback`.
    """

    training_bar: Any
    prediction_bar: Any

    def __init__(self, trainer: EMATrainerMixin, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.trainer = trainer
        self.kept: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.kept = None
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar by the steps done, and show the values of the last one."""
        bar: Any = self.training_bar
        if state.is_world_process_zero and not bar.disable:
            step = self.trainer.sampler.step(state.global_step - 1)
            values = {"clock": f"{step.end:.6g}", **step_values(self.trainer.plan, step, self.kept)}
            bar.set_postfix(values, refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the share kept, and write the log above the bar."""
        self.kept = (logs or {}).get("pseudo/kept", self.kept)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open a bar for an evaluation at its first batch; move it."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), leave=self.training_bar is None, dynamic_ncols=True, disable=None
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


def show_scaling(trainer: EMATrainerMixin) -> None:
    """Gives a trainer `ScalingProgress` in the place of Trainer's own bars; those of others, and none, are left."""
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[place] = ScalingProgress(trainer, callback.max_str_len)
