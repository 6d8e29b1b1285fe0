"""The arms of the demo: one model, one corpus, one labelled phase, and three ways to go on from there."""

from __future__ import annotations

import string
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
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
from transformers.trainer_utils import set_seed

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.speech import SpecAugment, build_character_processor
from hf_ema_scaling.data.speech_rows import longest_first, prepare_ctc
from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig, build_corpus
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.metrics import CTCMetrics
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint
from hf_ema_scaling.training.checks import drop_unfitting, fitting_rows
from hf_ema_scaling.training.flow import StopAt
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.process import peak_memory, prepare_process
from hf_ema_scaling.training.progress import step_values
from hf_ema_scaling.training.run_record import own_record

ARMS = ("labelled", "pseudo", "topline")
LABELLED_PHASE = "labelled_phase"
# The apostrophe is not in the corpus; with it the models can be fine-tuned on English as people write it.
ALPHABET = string.ascii_lowercase + "'"


@dataclass(frozen=True)
class DemoConfig:
    """The recipe of the demo, at its reference batch of 16 utterances."""

    steps: int = 2000
    pl_start: int = 800
    unlabeled_ratio: float = 1.0
    reference_batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    ema_momentum: float = 0.985
    hidden_size: int = 128
    layers: int = 3
    intermediate_size: int = 256
    conv_channels: int = 16
    dropout: float = 0.1
    evaluations: int = 3

    def of_length(self, steps: int) -> DemoConfig:
        """The same recipe in so many reference steps; labelled phase and warm-up keep their share of them."""
        return replace(
            self,
            steps=steps,
            pl_start=round(self.pl_start * steps / self.steps),
            warmup_steps=round(self.warmup_steps * steps / self.steps),
        )


@dataclass(frozen=True)
class ArmJob:
    """One arm of a demo, in words that another process understands.

    Args:
        name: of `ARMS`, or `LABELLED_PHASE`.
        config: the recipe.
        corpus: what is spoken; read from `cache`, or built there.
        cache: folder of the corpus.
        folder: run folder.
        kappa: batch over reference batch after the labelled phase.
        seed: of initialisation, order, dropout and augmentation.
        scale_ema: False for the ablation.
        branch: checkpoint to start from; the labelled phase has none.
        row: line of the terminal for the progress bar.
    """

    name: str
    config: DemoConfig
    corpus: SyntheticCorpusConfig
    cache: Path
    folder: Path
    kappa: float
    seed: int
    scale_ema: bool
    branch: str | None = None
    row: int = 0


@dataclass(frozen=True)
class ArmResult:
    """What an arm hands back: word error rates at the end, steps, seconds, the log, and the memory of its process."""

    student_wer: float
    average_wer: float
    steps: int
    seconds: float
    history: list[dict[str, Any]]
    peak_memory_bytes: int


def run_labelled_phase(job: ArmJob) -> tuple[str, float]:
    """Trains up to `pl_start`; returns the checkpoint from which the arms branch, and the seconds it took."""
    prepare_process()
    data = load_data(job)
    begun = time.time()
    stop = StopAt(job.config.pl_start)
    trainer = build_trainer(job, data, [stop])
    stop.trainer = trainer
    trainer.train()
    return str(newest_complete_checkpoint(job.folder)), time.time() - begun


def run_arm(job: ArmJob) -> ArmResult:
    """Trains one arm from its branch to the end and saves student and average."""
    prepare_process()
    data = load_data(job)
    begun = time.time()
    trainer = build_trainer(job, data, [])
    trainer.train(resume_from_checkpoint=job.branch)
    trainer.save_model()
    trainer.save_state()
    last = next(row for row in reversed(trainer.state.log_history) if "eval_ema_wer" in row)
    return ArmResult(
        student_wer=last["eval_wer"],
        average_wer=last["eval_ema_wer"],
        steps=trainer.state.global_step,
        seconds=time.time() - begun,
        history=trainer.state.log_history,
        peak_memory_bytes=peak_memory(),
    )


def load_data(job: ArmJob) -> DemoData:
    """The corpus of the job, without labelled rows whose text does not fit its frames."""
    data = prepare_data(job.corpus, job.cache)
    # Dense text on fast speech may need more frames than there are; which rows, only the model knows.
    model = build_model(job.config, data.processor, job.seed)
    if job.branch is None:
        data.labelled = drop_unfitting(model, data.labelled, "the labelled set")
    else:  # the labelled phase has said it
        data.labelled = data.labelled.select(fitting_rows(model, data.labelled))
    return data


@dataclass
class DemoData:
    """The corpus as features and label ids; `references` are the true labels of the unlabelled rows."""

    processor: Any
    labelled: Any
    unlabelled: Any
    evaluation: Any
    references: list[list[int]]


def prepare_data(config: SyntheticCorpusConfig, cache: Path) -> DemoData:
    """The synthetic corpus as features and labels; built once per configuration and then read from `cache`."""
    corpus = build_corpus(config, cache)
    processor = build_character_processor(ALPHABET)
    truth = prepare_ctc(corpus["unlabelled"], processor, text_column="hidden_reference")
    return DemoData(
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


def run_record(job: ArmJob) -> dict[str, Any]:
    """What `run.json` of an arm says: the command that trains it again, and on what speech."""
    corpus = job.corpus
    sets = {
        "labelled": f"synthetic speech (eSpeak NG), {corpus.labelled_minutes:g} minutes in a quiet room",
        "unlabelled": f"the same, {corpus.unlabelled_minutes:g} minutes by other voices in noise of any strength",
        "evaluation": f"the same, {corpus.evaluation_minutes:g} minutes by further voices in such noise",
    }
    if job.name not in ("pseudo", "topline"):
        del sets["unlabelled"]
    arm = "labelled" if job.name == LABELLED_PHASE else job.name
    words = ["hf-ema-scaling", "demo", "--arms", arm, "--seed", str(job.seed)]
    words += ["--kappa", f"{job.kappa:g}"] if job.kappa != 1 else []
    words += [] if job.scale_ema else ["--no-scale-ema"]
    words += ["--steps", str(job.config.steps)] if job.config.steps != DemoConfig().steps else []
    # Other recipes and corpora are of programs that call `run_demo`, and no command makes them.
    ours = job.config == DemoConfig().of_length(job.config.steps) and corpus == SyntheticCorpusConfig(seed=job.seed)
    record = own_record({}, None, 1, command=words if ours else ())
    settings = {"seed": job.seed, "kappa": job.kappa, **asdict(job.config)}
    return {**record, "data": sets, "settings": settings, "preparation": ['pip install -e ".[demo,report]"']}


class ToplineTrainer(PseudoLabelTrainer):
    """The pseudo-label trainer with the true labels in the place of the teacher's: the most that labels can give.

    Args:
        references: label ids of every unlabelled row.
        **kwargs: as for `PseudoLabelTrainer`.
    """

    def __init__(self, *args: Any, references: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.references = references

    def labels_of(self, batch: MicroBatch) -> list[PseudoLabel]:
        """The true labels of the rows."""
        return [PseudoLabel(tuple(self.references[index]), 1.0) for index in batch["indices"]]


class _Progress(TrainerCallback):
    """A bar on the reference clock, and one line per evaluation."""

    def __init__(self, job: ArmJob) -> None:
        self.job = job
        self.trainer: EMATrainerMixin | None = None
        self.bar: Any = None
        self.kept: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.time()
        # The labelled phase is part of every arm's clock.
        self.bar = tqdm(
            total=self.job.config.steps,
            initial=round(self.clock(state)),
            desc=f"{self.job.name:>14}",
            position=self.job.row,
            leave=False,
            disable=None,
        )

    def clock(self, state: TrainerState) -> float:
        assert self.trainer is not None
        return self.trainer.sampler.step(state.global_step - 1).end if state.global_step else 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.trainer is not None
        step = self.trainer.sampler.step(state.global_step - 1)
        self.bar.set_postfix(step_values(self.trainer.plan, step, self.kept), refresh=False)
        self.bar.update(round(self.clock(state)) - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.kept = kwargs["logs"].get("pseudo/kept", self.kept)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        tqdm.write(
            f"{self.job.name:>14}  reference step {self.clock(state):6.0f} of {self.job.config.steps}  "
            f"WER student {metrics['eval_wer']:.3f}  average {metrics['eval_ema_wer']:.3f}  "
            f"{time.time() - self.begun:5.0f} s",
            file=sys.stderr,
        )


def build_trainer(job: ArmJob, data: DemoData, callbacks: list[TrainerCallback]) -> EMATrainerMixin:
    """The trainer of an arm."""
    config = job.config
    every = max(1, (config.steps - config.pl_start) // config.evaluations)
    args = EMATrainingArguments(
        output_dir=str(job.folder),
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
        scale_ema=job.scale_ema,
        kappa=job.kappa,
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
        seed=job.seed,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    shared: dict[str, Any] = {
        "model": build_model(config, data.processor, job.seed),
        "args": args,
        "train_dataset": data.labelled,
        "eval_dataset": data.evaluation,
        "processing_class": data.processor,
        "compute_metrics": CTCMetrics(data.processor.tokenizer, data.processor.tokenizer.pad_token_id).compute,
        "augmentation": SpecAugment(),
        "callbacks": [progress := _Progress(job), *callbacks],
    }
    builders: dict[str, Callable[..., EMATrainerMixin]] = {"pseudo": PseudoLabelTrainer, "topline": ToplineTrainer}
    if job.name in builders:
        shared["unlabeled_dataset"] = data.unlabelled
        shared["pseudo_label_args"] = PseudoLabelArguments(
            pl_start=config.pl_start, unlabeled_ratio=config.unlabeled_ratio
        )
    if job.name == "topline":
        shared["references"] = data.references
    trainer = builders.get(job.name, EMATrainer)(**shared)
    progress.trainer = trainer
    trainer.run_record = run_record(job)
    # The demo's own lines and bars take their place.
    trainer.pop_callback(PrinterCallback)
    return trainer
