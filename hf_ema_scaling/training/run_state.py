"""What a checkpoint says about its run beside the average: steps done, identity of the data, counters of the log."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_ema_scaling.ema import AverageStateError
from hf_ema_scaling.ema.durable import check_seal
from hf_ema_scaling.ema.storage import STATE_NAME
from hf_ema_scaling.scaling import StepBorders, known_rule
from hf_ema_scaling.scaling.schedule import DUST

logger = logging.get_logger(__name__)

UNLABELLED_KEYS = ("pl_start", "unlabelled_items", "unlabelled_sizes", "cache")


@dataclass
class RunState:
    """The state of a run that the weights, the optimizer and Trainer's own files do not hold; JSON values only.

    Args:
        global_step: optimizer steps done.
        clock: reference steps done.
        borders: the steps done, as `StepBorders.to_json`; a resumed run keeps them.
        identity: `RunLayout.identity`.
        recipe: the recipe at the reference batch, as a dictionary.
        loss: sum of the losses since the last log, a mean over processes.
        losses: the same of each process, so that as many processes go on with the very bits.
        last_logged: optimizer step of the last log.
        counters: what is counted between logs.
        student: `student_checksums` of the files beside the average.
        checkpoint: the folder that this was read from; not part of the state.
    """

    global_step: int
    clock: float
    borders: list[dict[str, float]]
    identity: dict[str, Any]
    recipe: dict[str, Any]
    loss: float = 0.0
    losses: list[float] = field(default_factory=list)
    last_logged: int = 0
    counters: dict[str, Any] = field(default_factory=dict)
    student: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        state = asdict(self)
        del state["checkpoint"]
        return state

    def loss_of(self, process: int, processes: int) -> float:
        """What one of so many processes goes on with."""
        return self.losses[process] if len(self.losses) == processes else self.loss

    @property
    def done(self) -> StepBorders:
        """The steps done."""
        return StepBorders.from_json(self.borders)

    def changed_values(self, recipe: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Values of the recipe that may change on resume and did: name to then and now."""
        # `check_identity` knows when these may.
        open_keys = {"pl_start", "unlabelled_ratio", "steps_per_epoch", "cache_steps"}
        now = json.loads(json.dumps(recipe))  # tuples as the file has them
        return {
            key: (self.recipe[key], value)
            for key, value in now.items()
            if key not in open_keys and key in self.recipe and self.recipe[key] != value
        }

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuses to continue with other data or another reference recipe.

        What concerns unlabelled data may change as long as none has been drawn, so runs that differ in it can branch
        from one labelled phase; its ratio may also change later, from the checkpoint on. So may the scaling rule as
        long as every batch was the reference batch, where all rules agree.

        Raises:
            ValueError: naming every value that differs.
        """
        # Not the clock: in seconds that is past the border of the last step by a part of an utterance.
        reached = self.done.position
        before, now = _drawn_at(self.identity, reached), _drawn_at(identity, reached)
        starts = [start for start in (self.identity.get("pl_start"), identity["pl_start"]) if start is not None]
        open_keys = UNLABELLED_KEYS if all(reached <= start for start in starts) else ()
        if all(segment.kappa == 1 for segment in self.done.segments):
            open_keys = (*open_keys, "scaling_rule")
        changed = {
            key: (before.get(key), value)
            for key, value in now.items()
            if before.get(key) != value and key not in open_keys
        }
        if changed:
            listed = ", ".join(f"{key}: {old} then, {new} now" for key, (old, new) in changed.items())
            raise ValueError(
                f"the checkpoint belongs to a run with other data or another reference recipe ({listed}). kappa, "
                "batch_size, batch_schedule and the number of processes may change on resume; these may not. (The "
                f"ratio of unlabelled to labelled units may from reference step {reached:g} on: let a stage end there)"
            )


def _drawn_at(identity: dict[str, Any], reached: float) -> dict[str, Any]:
    """An identity without the ratios that begin after `reached` reference steps."""
    ratios = [piece for piece in identity.get("unlabelled_ratios", []) if piece[0] < reached - DUST]
    return {**identity, "unlabelled_ratios": ratios}


def read_run_state(checkpoint: str | Path) -> RunState:
    """The run state in a checkpoint of the trainers.

    Raises:
        AverageStateError: when the checkpoint has none, or it cannot be read.
    """
    path = Path(checkpoint) / "ema" / STATE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check_seal(record)
        return RunState(**record["state"], checkpoint=Path(checkpoint))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AverageStateError(
            f"{checkpoint} cannot be resumed: {path.name} in its 'ema' folder is missing or damaged ({error}). Only "
            "checkpoints written by this library's trainers can be resumed; start from the weights of others instead, "
            "or set on_missing_average='rebuild' if the average was there and is lost"
        ) from error


def run_state_to_resume(checkpoint: str | Path | None, *, rebuild: bool) -> RunState | None:
    """The run state of the checkpoint to resume; None without one, or where it is lost with an average to rebuild.

    Raises:
        AverageStateError: when it is missing or damaged, without `rebuild`.
    """
    if checkpoint is None:
        return None
    try:
        return read_run_state(checkpoint)
    except AverageStateError as error:
        if not rebuild:
            raise
        logger.warning(
            f"The run state in {checkpoint} is lost ({error.__cause__}): the steps done are taken to be those of this "
            "run's schedule, and what was counted since the last log starts at 0."
        )
        return None


# Exact types: a subclass may do anything else, as NAdam and its like do.
OPTIMIZER_FAMILIES: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.AdamW: "adamw",
    torch.optim.Adam: "adam",
    torch.optim.SGD: "sgd",
    torch.optim.RMSprop: "rmsprop",
    torch.optim.Adagrad: "adagrad",
}


def optimizer_family(name: str, optimizer: Any | None) -> str:
    """Name for the scaling rule: of the optimizer given to the trainer, else of `args.optim`.

    A rule registered under the name of the optimizer's class comes first.

    Raises:
        ValueError: for SGD with dampening and Adagrad with lr_decay, for which no rule is known; for Adam whose param
            groups do not agree on decoupled_weight_decay.
    """
    if optimizer is None:
        return str(getattr(name, "value", name))
    kind = type(getattr(optimizer, "optimizer", optimizer))
    if known_rule(kind.__name__) is not None:
        return kind.__name__
    family = OPTIMIZER_FAMILIES.get(kind, kind.__name__)
    if family == "adam":
        decoupled = {bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}
        if len(decoupled) > 1:
            raise ValueError(
                "Adam's param groups do not agree on decoupled_weight_decay, and the two kinds of weight decay scale "
                "by different rules: set it in all of them, or in none"
            )
        return "adamw" if True in decoupled else "adam"
    if family == "sgd" and any(group.get("dampening") for group in optimizer.param_groups):
        raise ValueError("SGD with dampening has no scaling rule: set dampening=0")
    if family == "adagrad" and any(group.get("lr_decay") for group in optimizer.param_groups):
        raise ValueError(
            "Adagrad's lr_decay has no scaling rule, since it counts optimizer steps and not reference steps: set "
            "lr_decay=0 and choose lr_scheduler_type, which runs on the reference clock"
        )
    return family
