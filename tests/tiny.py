"""Random models and data small enough to train in a test, and a record of what a run did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    PreTrainedModel,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.ema.sharding import gathered, reshard
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.trainer import EMATrainer, PseudoLabelTrainer

Tensors = dict[str, Tensor]
VOCABULARY = 9


def bert(*, dropout: float = 0.0, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def wav2vec2(*, dropout: float = 0.0, layerdrop: float = 0.0, masking: float = 0.0, seed: int = 0) -> Wav2Vec2ForCTC:
    """Layer norm throughout: rows do not see each other or padding. Blanks are made rare, so it labels something."""
    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(6, 6),
        conv_kernel=(8, 4),
        conv_stride=(8, 4),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        feat_proj_dropout=dropout,
        final_dropout=dropout,
        layerdrop=layerdrop,
        mask_time_prob=masking,
        mask_time_length=2,
        initializer_range=0.3,
    )
    return _few_blanks(Wav2Vec2ForCTC(config), "lm_head.bias")


def parakeet(*, dropout: float = 0.0, seed: int = 0) -> ParakeetForCTC:
    """With BatchNorm in its block."""
    torch.manual_seed(seed)
    encoder = ParakeetEncoderConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_mel_bins=8,
        subsampling_factor=4,
        subsampling_conv_channels=4,
        conv_kernel_size=3,
        dropout=dropout,
        dropout_positions=dropout,
        layerdrop=0.0,
        attention_dropout=dropout,
        activation_dropout=dropout,
    )
    model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=VOCABULARY, encoder_config=encoder, pad_token_id=0))
    return _few_blanks(model, "ctc_head.bias")


def _few_blanks(model: Any, bias: str) -> Any:
    with torch.no_grad():
        dict(model.named_parameters())[bias][0] = -2.0
    return model


def sentences(count: int, seed: int = 0, *, lengths: tuple[int, int] = (6, 7)) -> datasets.Dataset:
    """Rows of `input_ids`, as many as `range(*lengths)` holds by chance, and one label."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (count, lengths[1] - 1))
    labels = rng.integers(0, 3, count).tolist()
    kept = rng.integers(*lengths, count)
    rows = [row[:length].tolist() for row, length in zip(tokens, kept, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}).with_format("torch")


def pad_sentences(rows: list[dict[str, Any]]) -> Tensors:
    """Collates rows of `sentences` of any lengths."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask} | (
        {"labels": torch.stack([torch.as_tensor(row["labels"]) for row in rows])} if "labels" in rows[0] else {}
    )


def speech(
    count: int, seed: int = 0, *, labels: bool = True, features: int = 0, lengths: tuple[int, int] = (20, 40)
) -> datasets.Dataset:
    """Noise: raw audio of `lengths` output frames, or `features` bins of four times as many frames."""
    rng = np.random.default_rng(seed)
    name = "input_features" if features else "input_values"
    inputs = []
    for _ in range(count):
        frames = int(rng.integers(*lengths))
        shape = (4 * frames, features) if features else (32 * frames,)
        inputs.append(rng.standard_normal(shape).astype(np.float32).tolist())
    columns: dict[str, Any] = {name: inputs, "duration": [len(row) / 100 for row in inputs]}
    if labels:
        columns["labels"] = [rng.integers(1, VOCABULARY, int(rng.integers(2, 6))).tolist() for _ in range(count)]
    return datasets.Dataset.from_dict(columns).with_format("numpy")


class ContentLabeler:
    """Labels and drops rows by their own content alone, so that no batch can change the outcome."""

    def __init__(self, drop: Callable[[int], bool] = lambda number: number % 3 == 0) -> None:
        self.drop = drop

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        name = "input_values" if "input_values" in batch else "input_features"
        labels = []
        for row in batch[name]:
            number = int(abs(float(row.flatten()[0])) * 1000)
            ids = tuple(1 + (number // 7**place) % (VOCABULARY - 1) for place in range(3))
            dropped = self.drop(number)
            labels.append(PseudoLabel(() if dropped else ids, 0.5, "confidence" if dropped else None))
        return labels


class Recorder(TrainerCallback):
    """What each optimizer step saw and left behind."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.gradients: list[Tensors] = []
        """After clipping; zeros where there is none."""
        self.groups: list[list[dict[str, Any]]] = []
        """The optimizer's param groups as the step used them."""
        self.weights: list[Tensors] = []
        """The student after the step."""
        self.averages: list[Tensors] = []
        """The average after the step's update."""
        self.before: list[dict[str, Tensors]] = []
        """The optimizer's state by parameter name before the step."""
        self.after: list[dict[str, Tensors]] = []
        """The same after it."""
        self.events: list[tuple[str, int, float]] = []
        """Name, optimizer step and clock of every log, evaluation and save."""
        self.initial: Tensors = {}

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.initial = parameters(model)

    def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.before.append(self._optimizer_state(optimizer))

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.gradients.append(
            {
                name: torch.zeros(p.shape, dtype=p.dtype) if p.grad is None else whole(p.grad)
                for name, p in model.named_parameters()
            }
        )
        self.groups.append(
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        )

    def on_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.weights.append(parameters(model))
        self.averages.append(average(self.trainer))
        self.after.append(self._optimizer_state(optimizer))

    def _optimizer_state(self, optimizer: Any) -> dict[str, Tensors]:
        return {
            name: {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[p].items()
            }
            for name, p in self.trainer.model.named_parameters()
            if p in optimizer.state
        }

    def _event(self, name: str, state: Any) -> None:
        step = self.trainer.sampler.step(state.global_step - 1) if state.global_step else None
        self.events.append((name, state.global_step, 0.0 if step is None else step.end))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._event("log", state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._event("evaluate", state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._event("save", state)

    def clocks(self, name: str) -> list[float]:
        return [clock for event, _, clock in self.events if event == name]


class Recorded:
    """Mixed into a trainer: which items every step drew, and its micro-batches' sources and weights."""

    drawn: list[list[tuple[int, int, int]]]
    rounds: list[list[tuple[int, float]]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.__dict__.setdefault("drawn", []).append(
            [
                (batch["source"], index, position)
                for batch in inputs["micro_batches"]
                for index, position in zip(batch["indices"], batch["positions"], strict=True)
            ]
        )
        self.__dict__.setdefault("rounds", []).append(
            [(batch["source"], float(batch["weight"])) for batch in inputs["micro_batches"]]
        )
        result: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return result


class RecordedEMATrainer(Recorded, EMATrainer):
    pass


class RecordedPseudoLabelTrainer(Recorded, PseudoLabelTrainer):
    pass


def arguments(folder: Path | str, **changes: Any) -> EMATrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 4,
        "reference_batch_size": 4,
        "ema_momentum": 0.9,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EMATrainingArguments(str(folder), **(values | changes))


def trainer(model: PreTrainedModel, args: EMATrainingArguments, train: Any, **more: Any) -> Any:
    """A trainer with a `recorder`; a `PseudoLabelTrainer` where `unlabeled_dataset` is given."""
    recorder = Recorder()
    if isinstance(model, (Wav2Vec2ForCTC, ParakeetForCTC)):
        more.setdefault("data_collator", CTCCollator())
    more["callbacks"] = [recorder, *more.get("callbacks", [])]
    kind = RecordedPseudoLabelTrainer if "unlabeled_dataset" in more else RecordedEMATrainer
    made: Any = kind(model, args, train_dataset=train, **more)
    made.recorder, recorder.trainer = recorder, made
    return made


class Unwatched(TrainerCallback):
    """Takes the liveness watch away, for runs that stand still on purpose."""

    trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._watch = None


def at_fixed_weights(model: PreTrainedModel, args: EMATrainingArguments, train: Any, **more: Any) -> Any:
    """A finished run at learning rate 0, for its gradients."""
    args.learning_rate = 0.0
    unwatched = Unwatched()
    made = trainer(model, args, train, callbacks=[unwatched], **more)
    unwatched.trainer = made
    made.train()
    return made


def pseudo(**changes: Any) -> PseudoLabelArguments:
    return PseudoLabelArguments(**changes)


def whole(tensor: Tensor) -> Tensor:
    """A copy; of all shards together, which every process must ask for."""
    return gathered(tensor.detach()).clone()


def parameters(model: nn.Module) -> Tensors:
    """Copies by name, without the prefix of a wrapper, of all shards together."""
    reshard(model)
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def average(made: Any) -> Tensors:
    """Copies of the average by name, of all shards together."""
    return {name: whole(tensor) for name, tensor in made.average.tensors().items()}


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """||a - b|| / ||a|| over all tensors, in float64."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    size = sum(float(value.double().square().sum()) for value in a.values())
    return (apart / size) ** 0.5


def mean(gradients: list[Tensors], weights: list[float] | None = None) -> Tensors:
    """Weighted mean by name, in float64."""
    shares = np.full(len(gradients), 1 / len(gradients)) if weights is None else np.array(weights) / sum(weights)
    return {
        name: sum(share * g[name].double() for share, g in zip(shares, gradients, strict=True))  # type: ignore[misc]
        for name in gradients[0]
    }


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested structures hold the same values, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
