"""The EMA scaling rule in a plain Accelerate loop, without any Trainer, on data that the script makes itself.

    python scripts/accelerate_loop.py out --kappa 4
    accelerate launch --cpu --num_processes 2 scripts/accelerate_loop.py out --kappa 4 --pseudo-labels
    python scripts/accelerate_loop.py out --kappa 4 --resume

A row is eight symbols; its class is the symbol that occurs most often. A fifth of the labels is wrong. With
`--pseudo-labels` three of four rows have no label, and the average gives them one. The recipe is stated at a reference
batch of 16 rows; a step of kappa reference batches takes the learning rate and betas of AdamW's rule and moves the
average by `momentum ** kappa`.

The same loop stopped and resumed ends with the same bits.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hf_ema_scaling import EMATeacher, ReferenceClock, SkipWatch, WeightAverage, register_average
from hf_ema_scaling.ema import check_before_labelling, save_average
from hf_ema_scaling.scaling import OptimizerValues, scaling_rule

# The recipe, at the reference batch.
REFERENCE_BATCH = 16
REFERENCE = OptimizerValues(learning_rate=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
MOMENTUM = 0.98
PL_START = 200
"""Reference steps until the average has something to teach."""
CONFIDENCE = 0.8

SYMBOLS, LENGTH, ROWS, UNLABELLED = 6, 8, 1024, -1
SEED = 0


class Net(nn.Module):
    """Counts symbols, if it learns to."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(SYMBOLS, 32, mode="sum")
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, SYMBOLS))

    def forward(self, rows: Tensor) -> Tensor:
        """Class scores (batch, SYMBOLS) of rows (batch, LENGTH) of symbols."""
        return self.layers(self.embed(rows))


def make_rows(count: int, seed: int, *, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of symbols and their classes, a share of which is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
    classes = functional.one_hot(rows, SYMBOLS).sum(1).argmax(1)
    noise = torch.randint(SYMBOLS, (count,), generator=generator)
    return rows, torch.where(torch.rand(count, generator=generator) < wrong, noise, classes)


def batch_loss(model: nn.Module, teacher: EMATeacher | None, rows: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses of labelled rows and of those that the teacher labels with confidence, over all rows."""
    if teacher is not None:
        confidence, given = teacher(rows).softmax(1).max(1)
        unlabelled = labels == UNLABELLED
        labels = torch.where(unlabelled & (confidence >= CONFIDENCE), given, labels)
    loss = functional.cross_entropy(model(rows), labels, ignore_index=UNLABELLED, reduction="sum")
    return loss / len(rows)


@torch.no_grad()
def accuracy(model: nn.Module, rows: Tensor, classes: Tensor) -> float:
    """Share of rows that are classified rightly."""
    model.eval()
    found = model(rows).argmax(1)
    model.train()
    return float((found == classes).float().mean())


def newest(folder: Path) -> Path:
    """The checkpoint with the most steps."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not found:
        raise typer.BadParameter(f"there is no checkpoint step-N in {folder} to resume")
    return found[-1]


def save(accelerator: Accelerator, checkpoint: Path) -> None:
    """Saves the state of the loop; a checkpoint of this name is complete."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)
    accelerator.wait_for_everyone()


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and the average go.")],
    kappa: Annotated[int, typer.Option(min=1, help="Reference batches per step.")] = 1,
    reference_steps: Annotated[int, typer.Option(help="Length of the run.")] = 800,
    save_every: Annotated[int, typer.Option(help="Reference steps between checkpoints; a multiple of kappa.")] = 400,
    stop_after: Annotated[int | None, typer.Option(help="Ends the program early, at this reference step.")] = None,
    resume: Annotated[bool, typer.Option(help="Continues from the newest checkpoint in the folder.")] = False,
    pseudo_labels: Annotated[bool, typer.Option(help="The average labels three of four rows.")] = False,
    dropout: Annotated[float, typer.Option(help="Without it every number of processes ends alike.")] = 0.1,
) -> None:
    """Trains, evaluates student and average, and writes the average to `folder/average`."""
    # A sampler whose order depends on seed and epoch alone: only so can a loop be resumed in the middle of an epoch.
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    if (REFERENCE_BATCH * kappa) % accelerator.num_processes:
        raise typer.BadParameter(f"{accelerator.num_processes} processes cannot share {REFERENCE_BATCH * kappa} rows")
    if ROWS % (REFERENCE_BATCH * kappa) or reference_steps % kappa or save_every % kappa:
        raise typer.BadParameter(f"kappa={kappa} must divide {ROWS // REFERENCE_BATCH} and the numbers of steps")
    set_seed(SEED)
    rows, labels = make_rows(ROWS, SEED, wrong=0.2)
    if pseudo_labels:
        labels[torch.arange(ROWS) % 4 != 0] = UNLABELLED
    loader = DataLoader(
        TensorDataset(rows, labels), batch_size=REFERENCE_BATCH * kappa // accelerator.num_processes, shuffle=True
    )
    model: nn.Module = Net(dropout)
    values = scaling_rule("adamw").scale(REFERENCE, kappa=kappa, stage_kappa=kappa)
    assert values.betas is not None and values.eps is not None
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), values.learning_rate, values.betas, values.eps, values.weight_decay
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    average = WeightAverage(model)
    clock = ReferenceClock(REFERENCE_BATCH)
    register_average(accelerator, model, average, clock)
    teacher = EMATeacher(model, average, factory=lambda: Net(dropout)) if pseudo_labels else None
    if teacher is not None:
        # Before the first label: the teacher is the network with other weights, and those are its own.
        few = {"rows": rows[:4].to(accelerator.device)}
        check_before_labelling(model, average, teacher, few)

    if resume:
        checkpoint = newest(folder)
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"resumed {checkpoint} at reference step {clock.position:g}")
    units = loader.total_batch_size  # of one step, over all processes
    watch = SkipWatch()
    step = round(clock.units / units)
    while clock.position < reference_steps:
        epoch, done = divmod(step, len(loader))
        remaining = skip_first_batches(loader, done) if done else loader
        remaining.set_epoch(epoch)
        for batch_rows, batch_labels in remaining:
            # What is random in a step depends on its number, so a resumed run draws the same.
            set_seed(SEED + 1 + step, device_specific=True)
            teaches = teacher if clock.position >= PL_START else None
            accelerator.backward(batch_loss(model, teaches, batch_rows, batch_labels))
            watch.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            taken = clock.advance(units)
            if not watch.was_skipped(optimizer):
                average.update(model, MOMENTUM, taken)
            step += 1
            if (step * kappa) % save_every == 0:
                save(accelerator, folder / f"step-{step}")
            if clock.position >= reference_steps:
                break
            if stop_after is not None and clock.position >= stop_after:
                accelerator.end_training()
                return

    inner = accelerator.unwrap_model(model)
    test = make_rows(2048, SEED + 1)
    student = accuracy(inner, *test)
    with average.swapped(inner):
        averaged = accuracy(inner, *test)
    accelerator.print(
        f"kappa {kappa}: {step} steps, {average.num_updates} updates; accuracy of the student {student:.3f}, of the "
        f"average {averaged:.3f}"
    )
    save_average(
        folder / "average", inner, average, state={"clock": clock.position}, write=accelerator.is_main_process
    )
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
