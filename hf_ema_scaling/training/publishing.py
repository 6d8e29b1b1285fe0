"""What a trainer pushes to the Hub, at the end and with its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from hf_ema_scaling.hub.details import CardDetails, is_repo_id
from hf_ema_scaling.hub.push import prepare, prepare_mirror
from hf_ema_scaling.report import draw_figures
from hf_ema_scaling.training.records import write_records, write_start

if TYPE_CHECKING:
    from hf_ema_scaling.training.mixin import EMATrainerMixin

logger = logging.get_logger(__name__)


def push_trained(
    trainer: EMATrainerMixin, message: str | None, blocking: bool, card: Mapping[str, Any], **target: Any
) -> CommitInfo | Future[CommitInfo] | None:
    """`Trainer.push_to_hub`: saves student and average, and pushes both as `hub_weights` says, in one commit.

    With figures of the run, as the report has them, where matplotlib is installed.

    Args:
        trainer: the trainer, on every process.
        message: of the commit.
        blocking: False to return before it is pushed.
        card: as for `Trainer.create_model_card`, or `details`.
        **target: `token`, `revision` and `private`; None for those of the arguments.

    Raises:
        ValueError: nothing was trained.
        PushError: it did not reach the Hub; all is saved in `output_dir`.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    if trainer.average is None:
        raise ValueError("there is no average to push: call train() first")
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    folder = Path(str(args.output_dir))
    write_records(trainer)
    trainer.save_state()  # its log is what figures are drawn of
    trainer._finish_current_push()
    names = {"token": "hub_token", "revision": "hub_revision", "private": "hub_private_repo"}
    options: dict[str, Any] = {
        name: getattr(args, names[name]) if value is None else value for name, value in target.items()
    }
    job = prepare(
        folder,
        _repo(trainer),
        hub_weights=args.hub_weights,
        message=message,
        details=_details(dict(card)),
        draw=draw_figures,
        # What is trained or saved next must not get into it.
        place=None if blocking else shutil.copy2,
        api=hf_api(),
        **options,
    )
    return job() if blocking else _in_background(job)


def push_checkpoint(trainer: EMATrainerMixin, checkpoint: str) -> None:
    """`Trainer._push_from_checkpoint`, by `hub_strategy`: the model with its card, and the checkpoint with `ema/`.

    Pushes in the background. What fails is told in the log and does not end the run: checkpoints stay on the disk.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    busy = getattr(trainer, "push_in_progress", None)
    if not args.hub_always_push and busy is not None and not busy.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    state = trainer.state
    steps = args.save_strategy == SaveStrategy.STEPS
    message = f"Training in progress, {f'step {state.global_step}' if steps else f'epoch {int(state.epoch or 0)}'}"
    write_start(trainer)
    # A checkpoint is never written to again, but may be deleted before it is pushed: hard links outlive that.
    common: dict[str, Any] = {
        "revision": args.hub_revision,
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "place": os.link,
        "beside": Path(str(args.output_dir)),
        "api": hf_api(),
    }
    jobs = []
    try:
        jobs.append(prepare(checkpoint, _repo(trainer), hub_weights=args.hub_weights, message=message, **common))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            within = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
            message = f"{message}, checkpoint"
            jobs.append(prepare_mirror(checkpoint, _repo(trainer), within, message=message, **common))
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning(f"{checkpoint} is not pushed: {error}")
    futures = [_in_background(job) for job in jobs]
    if busy is None or busy.is_done():
        trainer.push_in_progress = PushInProgress(futures)  # type: ignore[arg-type]
    else:
        busy.jobs.extend(futures)


def _repo(trainer: EMATrainerMixin) -> str:
    args = trainer.args
    return str(trainer.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).absolute().name)


def _in_background(job: Callable[[], CommitInfo]) -> Future[CommitInfo]:
    future: Future[CommitInfo] = hf_api().run_as_future(job)

    def told(done: Future[CommitInfo]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.warning(str(error))

    future.add_done_callback(told)
    return future


def _details(card: dict[str, Any]) -> CardDetails:
    """From the arguments of `Trainer.create_model_card`."""
    if isinstance(details := card.pop("details", None), CardDetails):
        return details

    def several(name: str) -> tuple[str, ...]:
        value = card.pop(name, None) or ()
        return (value,) if isinstance(value, str) else tuple(value)

    base = card.pop("finetuned_from", None)
    details = CardDetails(
        title=card.pop("model_name", None),
        language=several("language"),
        license=card.pop("license", None),
        datasets=several("dataset_tags"),
        base_model=base if base is not None and is_repo_id(base) else None,
        tags=several("tags"),
    )
    if card:
        logger.warning(f"The model card has no use for {', '.join(card)}: see hf_ema_scaling.hub.CardDetails.")
    return details
