"""The demo: a small speech model, trained from scratch, learns from the pseudo-labels of its own EMA teacher.

Three arms share corpus, seed, length and their labelled phase, from whose checkpoint they branch: `labelled` goes on
with labelled data only, `pseudo` adds unlabelled data labelled by the teacher, `topline` adds it with its true labels.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, set_seed

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.speech import SpecAugment, build_character_processor, longest_first, prepare_ctc
from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig, build_corpus
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.metrics import CTCMetrics
from hf_ema_scaling.report import plot_runs
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.checks import drop_unfitting
from hf_ema_scaling.training.mixin import EMATrainerMixin

ARMS = ("labelled", "pseudo", "topline")
# The apostrophe is not in the corpus; with it the models can be fine-tuned on English as people write it.
ALPHABET = string.ascii_lowercase + "'"


@dataclass(frozen=True)
class DemoConfig:
    """The recipe of the demo, at its reference batch of 16 utterances."""

    steps: int = 1600
    pl_start: int = 500
    unlabeled_ratio: float = 3.0
    reference_batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    ema_momentum: float = 0.98
    hidden_size: int = 128
    layers: int = 3
    intermediate_size: int = 256
    conv_channels: int = 16
    dropout: float = 0.1
    evaluations: int = 3


class ToplineTrainer(PseudoLabelTrainer):
    """The pseudo-label trainer with the true labels in the place of the teacher's: the most that labels can give.

    Args:
        references: label ids of every unlabelled row.
        **kwargs: as for `PseudoLabelTrainer`.
    """

    def __init__(self, *args: Any, references: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.references = references

    def labels_of(self, micro_batch: MicroBatch) -> list[PseudoLabel]:
        """The true labels of the rows."""
        return [PseudoLabel(tuple(self.references[index]), 1.0) for index in micro_batch["indices"]]


class _StopAt(TrainerCallback):
    """Saves and stops at the first step at which the clock has reached `clock` reference steps."""

    def __init__(self, clock: float) -> None:
        self.clock = clock
        self.trainer: EMATrainerMixin | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert self.trainer is not None
        if self.trainer.sampler.step(state.global_step - 1).end >= self.clock:
            control.should_save = control.should_training_stop = True
        return control


class _Lines(TrainerCallback):
    """One line per evaluation, for whoever follows a log instead of a progress bar."""

    def __init__(self, arm: str, steps: int) -> None:
        self.arm, self.steps = arm, steps
        self.begun = time.time()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        clock = metrics.get("clock/reference_step", 0.0)
        print(
            f"{self.arm:>9}  reference step {clock:6.0f} of {self.steps}  WER student {metrics['eval_wer']:.3f}  "
            f"average {metrics['eval_ema_wer']:.3f}  {time.time() - self.begun:5.0f} s",
            file=sys.stderr,
            flush=True,
        )


@dataclass
class _Data:
    processor: Any
    labelled: Any
    unlabelled: Any
    evaluation: Any
    references: list[list[int]]


def prepare_data(config: SyntheticCorpusConfig, cache: Path) -> _Data:
    """The synthetic corpus as features and labels; built once per configuration and then read from `cache`."""
    corpus = build_corpus(config, cache)
    processor = build_character_processor(ALPHABET)
    truth = prepare_ctc(corpus["unlabelled"], processor, text_column="hidden_reference")
    return _Data(
        processor=processor,
        labelled=prepare_ctc(corpus["labelled"], processor),
        unlabelled=truth.remove_columns("labels"),
        evaluation=longest_first(prepare_ctc(corpus["evaluation"], processor)),
        references=[[int(token) for token in row] for row in truth["labels"]],
    )


def build_model(config: DemoConfig, processor: Any, seed: int) -> ParakeetForCTC:
    """A randomly initialised Parakeet CTC model of about a million parameters."""
    set_seed(seed)
    encoder = ParakeetEncoderConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        intermediate_size=config.intermediate_size,
        num_mel_bins=processor.feature_extractor.feature_size,
        # Characters need a frame every 40 ms: with a factor of 8 many labels would not fit their frames.
        subsampling_factor=4,
        subsampling_conv_channels=config.conv_channels,
        conv_kernel_size=9,
        dropout=config.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
    )
    tokenizer = processor.tokenizer
    return ParakeetForCTC(
        ParakeetCTCConfig(vocab_size=len(tokenizer), encoder_config=encoder, pad_token_id=tokenizer.pad_token_id)
    )


def run_demo(
    output_dir: Path,
    *,
    arms: Iterable[str] = ("labelled", "pseudo"),
    kappa: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
    scale_ema: bool = True,
    corpus: SyntheticCorpusConfig | None = None,
) -> dict[str, Any]:
    """Runs the arms and returns the summary that `--json` prints.

    Args:
        output_dir: run folders, `report.png` and `summary.json`; replaced if it holds an earlier demo.
        arms: of `labelled`, `pseudo`, `topline`.
        kappa: batch over reference batch from the start of pseudo-labels on.
        seed: of corpus, initialisation, order, dropout and augmentation.
        steps: reference steps; the labelled phase keeps its share of them.
        scale_ema: False leaves the momentum unscaled, as an ablation.
        corpus: another corpus than the one of about 7 + 45 + 6 minutes for this seed.

    Raises:
        ValueError: for an unknown arm.
        FileExistsError: when the output folder holds something else.
        ImportError: without the extra `demo`.
    """
    chosen = tuple(dict.fromkeys(arms))
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown or not chosen:
        raise ValueError(f"arms are {', '.join(ARMS)}; got {', '.join(unknown) or 'none'}")
    config = DemoConfig()
    if steps is not None:
        config = DemoConfig(
            steps=steps,
            pl_start=round(config.pl_start * steps / config.steps),
            warmup_steps=round(config.warmup_steps * steps / config.steps),
        )
    _clear(output_dir)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # The demo's own lines say what matters; warnings stay.
    logging.getLogger("transformers").setLevel(logging.WARNING)
    data = prepare_data(corpus or SyntheticCorpusConfig(seed=seed), output_dir / "corpus")

    def trainer(arm: str, callbacks: list[TrainerCallback]) -> EMATrainerMixin:
        return _trainer(config, arm, data, output_dir / arm, kappa, seed, scale_ema, callbacks)

    # Dense text on fast speech may need more frames than there are; which rows, only the model knows.
    model = build_model(config, data.processor, seed)
    data.labelled = drop_unfitting(model, data.labelled, "the labelled set")

    begun = time.time()
    stop = _StopAt(config.pl_start)
    first = trainer("labelled_phase", [stop])
    stop.trainer = first
    first.train()
    shared = time.time() - begun
    branch = get_last_checkpoint(str(output_dir / "labelled_phase"))
    results: dict[str, dict[str, float]] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    for arm in chosen:
        begun = time.time()
        run = trainer(arm, [])
        run.train(resume_from_checkpoint=branch)
        run.save_model()
        run.save_state()
        last = next(row for row in reversed(run.state.log_history) if "eval_ema_wer" in row)
        results[arm] = {
            "student_wer": last["eval_wer"],
            "average_wer": last["eval_ema_wer"],
            "seconds": round(shared + time.time() - begun, 1),
            "steps": run.state.global_step,
        }
        histories[arm] = run.state.log_history
    summary = {
        "arms": results,
        "gap_recovered": gap_recovered(results),
        "kappa": kappa,
        "seed": seed,
        # Linux counts kilobytes, macOS bytes.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    (output_dir / "summary.json").write_text(
        json.dumps({**summary, "scale_ema": scale_ema, "recipe": asdict(config)}, indent=1) + "\n", encoding="utf-8"
    )
    title = f"Synthetic speech, kappa {kappa:g}, seed {seed}" + ("" if scale_ema else ", momentum not scaled")
    plot_runs(histories, output_dir / "report.png", title=title, start=config.pl_start)
    return summary


def gap_recovered(results: dict[str, dict[str, float]]) -> float | None:
    """Share of the gap from `labelled` to `topline` that `pseudo` closes, for the averages.

    None without all three arms, or where true labels gain nothing (runs too short to learn).
    """
    if any(arm not in results for arm in ARMS):
        return None
    labelled, pseudo, topline = (results[arm]["average_wer"] for arm in ARMS)
    if labelled <= topline:
        return None
    return (labelled - pseudo) / (labelled - topline)


def table(summary: dict[str, Any]) -> str:
    """The summary as people read it."""
    lines = [f"{'arm':>9}  {'student WER':>11}  {'average WER':>11}  {'steps':>6}  {'seconds':>8}"]
    for arm, row in summary["arms"].items():
        lines.append(
            f"{arm:>9}  {row['student_wer']:>11.3f}  {row['average_wer']:>11.3f}  {row['steps']:>6}  "
            f"{row['seconds']:>8.0f}"
        )
    if summary["gap_recovered"] is not None:
        lines.append(f"pseudo-labels recover {summary['gap_recovered']:.0%} of the gap to true labels")
    elif {"labelled", "pseudo"} <= summary["arms"].keys():
        ratio = summary["arms"]["pseudo"]["average_wer"] / summary["arms"]["labelled"]["average_wer"]
        lines.append(f"error with pseudo-labels: {ratio:.2f} x that of labelled data only")
    memory = summary["peak_memory_bytes"] / 2**20
    lines.append(f"kappa {summary['kappa']:g}, seed {summary['seed']}, peak memory {memory:.0f} MiB")
    return "\n".join(lines)


def _trainer(
    config: DemoConfig,
    arm: str,
    data: _Data,
    folder: Path,
    kappa: float,
    seed: int,
    scale_ema: bool,
    callbacks: list[TrainerCallback],
) -> EMATrainerMixin:
    every = max(1, (config.steps - config.pl_start) // config.evaluations)
    args = EMATrainingArguments(
        output_dir=str(folder),
        reference_batch_size=config.reference_batch_size,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=config.warmup_steps,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=5.0,
        ema_momentum=config.ema_momentum,
        scale_ema=scale_ema,
        kappa=kappa,
        small_batch_until=config.pl_start,
        bucket_window=8,
        # The first steps have enough to do with clean input.
        augment_start=config.pl_start,
        per_device_train_batch_size=config.reference_batch_size,
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=max(1, every // 4),
        save_strategy="no",
        seed=seed,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    shared: dict[str, Any] = {
        "model": build_model(config, data.processor, seed),
        "args": args,
        "train_dataset": data.labelled,
        "eval_dataset": data.evaluation,
        "processing_class": data.processor,
        "compute_metrics": CTCMetrics(data.processor.tokenizer, data.processor.tokenizer.pad_token_id).compute,
        "augmentation": SpecAugment(),
        "callbacks": [_Lines(arm, config.steps), *callbacks],
    }
    builders: dict[str, Callable[..., EMATrainerMixin]] = {"pseudo": PseudoLabelTrainer, "topline": ToplineTrainer}
    if arm in builders:
        shared["unlabeled_dataset"] = data.unlabelled
        shared["pseudo_label_args"] = PseudoLabelArguments(
            pl_start=config.pl_start, unlabeled_ratio=config.unlabeled_ratio
        )
    if arm == "topline":
        shared["references"] = data.references
    trainer = builders.get(arm, EMATrainer)(**shared)
    trainer.pop_callback(PrinterCallback)
    return trainer


def _clear(folder: Path) -> None:
    """Makes room for a new demo; refuses to touch anything that is not one."""
    if folder.exists() and any(folder.iterdir()):
        strangers = {entry.name for entry in folder.iterdir()} - {
            *ARMS,
            "labelled_phase",
            "corpus",
            "report.png",
            "summary.json",
        }
        if strangers:
            raise FileExistsError(
                f"{folder} holds other things than a demo ({', '.join(sorted(strangers)[:5])}): choose another"
            )
        for name in (*ARMS, "labelled_phase"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
