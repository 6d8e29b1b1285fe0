"""What a training step costs: supervised, pseudo-labelled without and with the label cache, and plain Trainer's.

    python scripts/benchmark_step.py

All steps are of the same audio, as many utterances of the same length. The trainers run side by side in one process,
each step of one after a step of the other, on one thread of noise and random labels. Times are CPU time of the
process, so that other programs do not matter; compared are the smallest. A step with the cache labels a random number
of items, so it is compared at their mean, on the line through the smallest times by that number.

Memory is the peak of a fresh process that trains with pseudo-labels at the batch of kappa reference batches; what
grows with kappa is the audio of the batch itself. Padding is compared on utterances of lognormal length: random
batches as plain Trainer draws them, and the trainers' length buckets.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
import typer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC

from hf_ema_scaling import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.data import CTCCollator, ScheduledBatchSampler
from hf_ema_scaling.training.process import peak_memory, prepare_process

RATE = 16_000
BATCH, MICRO_BATCH = 8, 2
UNLABELLED_RATIO = 3.0
REFRESH = 0.1
BUCKET_WINDOW = 64
WARM_UP = 3
"""Steps of each trainer that are not counted; the cache fills in the first."""
MEMORY_STEPS = 2


class Size(NamedTuple):
    """Of model and data."""

    hidden: int
    layers: int
    channels: int
    seconds: float
    items: int
    kappas: tuple[int, ...]


FULL = Size(hidden=256, layers=6, channels=64, seconds=2.0, items=96, kappas=(1, 4, 16))
QUICK = Size(hidden=32, layers=1, channels=8, seconds=0.25, items=64, kappas=(1, 16))


def model_of(size: Size) -> Wav2Vec2ForCTC:
    """A wav2vec2 with layer norm; blanks are made rare, so that its labels are not empty."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        pad_token_id=0,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        intermediate_size=4 * size.hidden,
        conv_dim=(size.channels,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.bias[0] = -2.0
    return model


def durations_of(size: Size, *, equal: bool) -> np.ndarray:
    """Seconds of each utterance: all alike, or lognormal about the same mean, from a quarter to five times as long."""
    if equal:
        return np.full(size.items, size.seconds)
    return size.seconds * np.clip(np.random.default_rng(0).lognormal(-0.2, 0.65, size.items), 0.25, 5.0)


def speech(size: Size, *, labels: bool = True, equal: bool = True) -> datasets.Dataset:
    """Noise with ten random labels a second."""
    rng = np.random.default_rng(1)
    seconds = durations_of(size, equal=equal)
    audio = [rng.standard_normal(int(RATE * duration)).astype(np.float32) for duration in seconds]
    columns: dict[str, Any] = {"input_values": audio, "duration": seconds}
    if labels:
        columns["labels"] = [rng.integers(1, 32, max(1, int(10 * duration))) for duration in seconds]
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def common(folder: str, **changes: Any) -> dict[str, Any]:
    """Arguments of every trainer."""
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": MICRO_BATCH,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return values | changes


def plain_trainer(folder: str, size: Size, steps: int, *, equal: bool = True) -> Trainer:
    """Trainer itself; with equal utterances in the same micro-batches, else in batches padded at random."""
    micro = MICRO_BATCH if equal else BATCH
    changes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": BATCH // micro}
    args = TrainingArguments(**common(folder, max_steps=steps, **changes))
    return Trainer(model_of(size), args, train_dataset=speech(size, equal=equal), data_collator=CTCCollator())


def supervised_trainer(folder: str, size: Size, steps: int, *, equal: bool = True) -> EMATrainer:
    """`EMATrainer`; in length buckets where utterances are not equal."""
    changes = {} if equal else {"bucket_window": BUCKET_WINDOW, "per_device_train_batch_size": BATCH}
    args = EMATrainingArguments(**common(folder, max_steps=steps, reference_batch_size=BATCH, **changes))
    data = speech(size, equal=equal)
    return EMATrainer(model_of(size), args, train_dataset=data, data_collator=CTCCollator())


def pseudo_trainer(
    folder: str, size: Size, steps: int, *, cache_steps: float = 0.0, kappa: float = 1.0
) -> PseudoLabelTrainer:
    """`PseudoLabelTrainer` from the first step on."""
    changes = {"small_batch_until": 0.0, "kappa": kappa} if kappa != 1 else {}
    args = EMATrainingArguments(**common(folder, max_steps=steps, reference_batch_size=BATCH, **changes))
    return PseudoLabelTrainer(
        model_of(size),
        args,
        train_dataset=speech(size),
        unlabeled_dataset=speech(size, labels=False),
        pseudo_label_args=PseudoLabelArguments(
            unlabeled_ratio=UNLABELLED_RATIO, cache_steps=cache_steps, cache_refresh=REFRESH
        ),
        data_collator=CTCCollator(),
    )


@dataclass
class Turn(TrainerCallback):
    """A trainer in a thread of its own, which takes one step each time it is asked to."""

    trainer: Any
    seconds: list[float] = field(default_factory=list)
    """CPU time of each step taken: from the end of the one before to its own end, data, log and all."""

    def __post_init__(self) -> None:
        self._go, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.trainer.pop_callback(PrinterCallback)
        self.trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)

    def _train(self) -> None:
        torch.set_num_threads(1)
        try:
            self._wait()
            self.trainer.train()
        except BaseException as error:
            self._error = error
        self._done.set()

    def _wait(self) -> None:
        self._go.wait()
        self._go.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Hand over."""
        self._done.set()
        self._wait()

    def step(self) -> None:
        """Take a step."""
        if self._thread.ident is None:
            self._thread.start()
        self._done.clear()
        begun = time.process_time()
        self._go.set()
        self._done.wait()
        self.seconds.append(time.process_time() - begun)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let the trainer finish, after its last step."""
        self._go.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


def expected_time(times: list[float], counts: list[int], mean: float) -> float:
    """Time of a step with `mean` items to label: on the line through the smallest time of each count."""
    groups = sorted(set(counts))
    best = [min(t for t, count in zip(times, counts, strict=True) if count == group) for group in groups]
    if len(groups) == 1:
        return best[0]
    weights = np.sqrt([counts.count(group) for group in groups])
    slope, intercept = np.polyfit(groups, best, 1, w=weights)
    return float(intercept + max(0.0, slope) * mean)


def real_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of frames that are no padding, where every batch is padded to its longest item."""
    padded = sum(len(batch) * float(lengths[batch].max()) for batch in batches)
    return sum(float(lengths[batch].sum()) for batch in batches) / padded


def bucketed_batches(sampler: ScheduledBatchSampler) -> list[np.ndarray]:
    """Rows of every micro-batch of a run."""
    groups = (group for number in range(sampler.num_steps) for group in sampler.micro_batches(number))
    return [sampler.stream.index[group] for group in groups if len(group)]


def measure_time(folder: str, size: Size, rounds: int) -> dict[str, float]:
    """Seconds per step of each trainer, and audio per second with either kind of padding."""
    steps = WARM_UP + rounds
    arms = {
        "plain": Turn(plain_trainer(folder, size, steps)),
        "supervised": Turn(supervised_trainer(folder, size, steps)),
        "pseudo": Turn(pseudo_trainer(folder, size, steps)),
        "cached": Turn(pseudo_trainer(folder, size, steps, cache_steps=1.0)),
        "random": Turn(plain_trainer(folder, size, steps, equal=False)),
        "bucketed": Turn(supervised_trainer(folder, size, steps, equal=False)),
    }
    for _ in range(steps):
        for arm in arms.values():
            arm.step()
    for arm in arms.values():
        arm.end()
    kept = {name: arm.seconds[WARM_UP:] for name, arm in arms.items()}
    sampler = arms["cached"].trainer.sampler
    borders = sampler.positions[WARM_UP:].tolist()
    counts = [len(sampler.stream.pool.events(first, last).positions) for first, last in pairwise(borders)]
    unlabelled = BATCH * UNLABELLED_RATIO / (1 + UNLABELLED_RATIO)
    found = {name: min(kept[name]) for name in ("plain", "supervised", "pseudo")}
    found["cached"] = expected_time(kept["cached"], counts, REFRESH * unlabelled)
    mean = float(durations_of(size, equal=False).mean())
    # Batches differ: a mean, where a minimum would be of the shortest audio.
    for name in ("random", "bucketed"):
        found[f"{name}_audio_per_second"] = BATCH * mean / float(np.mean(kept[name]))
    return found


def measure_padding(folder: str, size: Size) -> dict[str, float]:
    """Share of real frames of random batches and of the trainers' buckets, over many passes."""
    many = size._replace(items=2000)
    lengths = durations_of(many, equal=False)
    order = np.random.default_rng(0).permutation(len(lengths))
    args = EMATrainingArguments(
        **common(folder, max_steps=1000, reference_batch_size=BATCH, bucket_window=BUCKET_WINDOW)
        | {"per_device_train_batch_size": BATCH}
    )
    data = datasets.Dataset.from_dict({"input_values": [[0.0]] * len(lengths), "duration": lengths})
    made = EMATrainer(model_of(QUICK), args, train_dataset=data, data_collator=CTCCollator())
    return {
        "random": real_share(lengths, np.split(order, len(order) // BATCH)),
        "bucketed": real_share(lengths, bucketed_batches(made.sampler)),
    }


def measure_memory(size: Size, quick: bool) -> dict[int, int]:
    """Peak bytes of a fresh process by kappa."""
    found = {}
    for kappa in size.kappas:
        command = [sys.executable, str(Path(__file__)), "--memory_of", str(kappa), *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the process for kappa {kappa} failed: {done.stderr[-2000:]}")
        found[kappa] = int(done.stdout.split()[-1])
    return found


def report(seconds: dict[str, float], memory: dict[int, int], padding: dict[str, float]) -> str:
    """The figures for people."""
    names = {
        "plain": "plain Trainer",
        "supervised": "EMATrainer, supervised",
        "pseudo": f"PseudoLabelTrainer, {UNLABELLED_RATIO:g} unlabelled per labelled",
        "cached": f"the same with a cache refreshed by {REFRESH:g}",
    }
    lines = [f"{'step of the same audio':45} {'ms':>8} {'ratio':>7}"]
    lines += [
        f"{label:45} {1000 * seconds[name]:8.1f} {seconds[name] / seconds['supervised']:7.3f}"
        for name, label in names.items()
    ]
    lines.append(f"\n{'peak memory of training with pseudo-labels':45} {'MiB':>8} {'ratio':>7}")
    base = memory[min(memory)]
    lines += [
        f"{f'kappa {kappa}':45} {peak / 2**20:8.0f} {peak / base:7.3f}" for kappa, peak in sorted(memory.items())
    ]
    lines.append(f"\n{'padding of utterances of lognormal length':45} {'real':>8} {'audio s per s':>14}")
    lines += [
        f"{label:45} {padding[name]:8.3f} {seconds[f'{name}_audio_per_second']:14.2f}"
        for name, label in (("random", "random batches"), ("bucketed", "length buckets"))
    ]
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each trainer that are measured.")] = 10,
    quick: Annotated[
        bool, typer.Option(help="A tiny model and few steps: shows that it runs, measures nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False,
    memory_of: Annotated[
        int | None,
        typer.Option("--memory_of", hidden=True, help="Print the peak memory at this kappa, and nothing else."),
    ] = None,
) -> None:
    """Measure what a step costs in time, memory and padding."""
    prepare_process()
    # What plans of a few steps warn of is of no interest here.
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hf_ema_scaling").setLevel(logging.ERROR)
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        if memory_of is not None:
            made = pseudo_trainer(folder, size, MEMORY_STEPS * memory_of, kappa=float(memory_of))
            made.pop_callback(PrinterCallback)
            made.train()
            typer.echo(peak_memory())
            return
        seconds = measure_time(folder, size, 2 if quick else rounds)
        padding = measure_padding(folder, size)
    memory = measure_memory(size, quick)
    if not as_json:
        typer.echo(report(seconds, memory, padding))
        return
    found = {
        "pl_over_supervised": seconds["pseudo"] / seconds["supervised"],
        "pl_cached_over_supervised": seconds["cached"] / seconds["supervised"],
        "memory_kappa16_over_kappa1": memory[16] / memory[1],
        "real_frame_share": padding["bucketed"],
    }
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
