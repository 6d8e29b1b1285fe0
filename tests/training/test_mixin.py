"""Evaluating, choosing, saving and continuing with two sets of weights; and what of Trainer's insides is relied on."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers.trainer
from torch import nn
from transformers import BertForSequenceClassification, EvalPrediction, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.losses import classification_losses
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer
from hf_ema_scaling.training.trainer import EMATrainer

DEV = {"a": tiny.sentences(5, 11), "b": tiny.sentences(7, 12)}


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    scores = torch.as_tensor(prediction.predictions)
    return {"first": float(scores[:, 0].double().mean()), "rows": float(len(prediction.label_ids))}


def bert_run(folder: Path, **changes: Any) -> Any:
    more = {
        key: changes.pop(key)
        for key in ("eval_dataset", "compute_metrics", "callbacks", "model_init")
        if key in changes
    }
    model = changes.pop("model", None)
    more.setdefault("eval_dataset", DEV["a"])
    values = {"max_steps": 6, "learning_rate": 3e-2}
    if "model_init" not in more and model is None:
        model = tiny.bert()
    return tiny.trainer(model, tiny.arguments(folder, **(values | changes)), tiny.sentences(30), **more)


def plain_metrics(model: Any, data: Any) -> dict[str, float]:
    """Loss and metrics of one set of rows, without any Trainer."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.stack([torch.as_tensor(x) for x in data["input_ids"][:]])).logits
    labels = torch.as_tensor(data["labels"][:])
    losses = classification_losses(logits, labels, "single_label_classification")
    return {"loss": float(losses.double().mean()), "first": float(logits[:, 0].double().mean())}


# ---- Evaluate


def test_every_set_is_scored_with_student_and_average(tmp_path: Path) -> None:
    made = bert_run(
        tmp_path,
        eval_dataset=DEV,
        compute_metrics=metrics,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    made.train()
    for number, step in enumerate((3, 6)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        for name, data in DEV.items():
            entries = [entry for entry in made.state.log_history if f"eval_{name}_loss" in entry]
            assert [entry["step"] for entry in entries] == [3, 6]
            for prefix, folder in ((f"eval_{name}", checkpoint), (f"eval_ema_{name}", checkpoint / "ema")):
                expected = plain_metrics(BertForSequenceClassification.from_pretrained(folder), data)
                for key, value in expected.items():
                    assert entries[number][f"{prefix}_{key}"] == pytest.approx(value, rel=1e-6)
                assert entries[number][f"{prefix}_rows"] == len(data)
            assert entries[number][f"eval_{name}_loss"] != entries[number][f"eval_ema_{name}_loss"]
    assert made.recorder.clocks("evaluate") == [3, 3, 6, 6]


def test_the_exported_average_scores_as_reported_bit_for_bit(tmp_path: Path) -> None:
    made = bert_run(tmp_path, compute_metrics=metrics)
    made.train()
    scores = made.evaluate()
    made.save_model(str(tmp_path / "final"))
    for folder, prefix in (("final", "eval_"), ("final/ema", "eval_ema_")):
        model = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        again = bert_run(tmp_path / "other", model=model, compute_metrics=metrics).evaluate()
        assert again["eval_loss"] == scores[f"{prefix}loss"] and again["eval_first"] == scores[f"{prefix}first"]
        assert not [key for key in again if key.startswith("eval_ema")]


@pytest.mark.parametrize(
    ("which", "student", "average"), [("both", True, True), ("ema", False, True), ("student", True, False)]
)
def test_evaluate_weights(tmp_path: Path, which: str, student: bool, average: bool) -> None:
    made = bert_run(tmp_path, evaluate_weights=which, compute_metrics=metrics)
    made.train()
    before = tiny.parameters(made.model)
    scores = made.evaluate()
    assert tiny.same_bits(tiny.parameters(made.model), before)
    for key in ("loss", "first", "rows"):
        assert (f"eval_{key}" in scores) == student and (f"eval_ema_{key}" in scores) == average
    predicted = made.predict(DEV["b"])
    assert ("test_loss" in predicted.metrics) == student and ("test_ema_loss" in predicted.metrics) == average
    weights = tiny.average(made) if which == "ema" else before
    model = tiny.bert()
    model.load_state_dict({**model.state_dict(), **weights})
    assert float(predicted.predictions[:, 0].mean()) == pytest.approx(
        plain_metrics(model, DEV["b"])["first"], rel=1e-6
    )


def test_evaluation_loss_is_the_training_loss_cap_and_all(tmp_path: Path) -> None:
    made = bert_run(tmp_path, max_example_loss=0.5)
    model = tiny.bert().eval().requires_grad_(False)
    logits = torch.stack([model(input_ids=row["input_ids"][None]).logits[0] for row in DEV["a"]])
    losses = classification_losses(logits, torch.as_tensor(DEV["a"]["labels"][:]), "single_label_classification")
    assert float(losses.max()) > 0.5 > float(losses.min())
    assert made.evaluate()["eval_loss"] == pytest.approx(float(losses.clamp(max=0.5).mean()), rel=1e-6)


def test_eval_on_start_scores_the_initial_weights_twice(tmp_path: Path) -> None:
    made = bert_run(tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=6)
    made.train()
    first = made.state.log_history[0]
    assert first["step"] == 0 and first["eval_loss"] == first["eval_ema_loss"]
    assert first["eval_loss"] == pytest.approx(plain_metrics(tiny.bert(), DEV["a"])["loss"], rel=1e-6)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_an_evaluation_leaves_the_students_bits(tmp_path: Path, failing: int) -> None:
    calls = []

    def fails(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(tiny.parameters(made.model))
        if len(calls) == failing:
            raise ZeroDivisionError("a metric")
        return {}

    made = bert_run(tmp_path, compute_metrics=fails)
    made.train()
    before, average = tiny.parameters(made.model), tiny.average(made)
    with pytest.raises(ZeroDivisionError, match="a metric"):
        made.evaluate()
    assert tiny.same_bits(tiny.parameters(made.model), before) and not tiny.same_bits(before, average)
    assert tiny.same_bits(tiny.average(made), average)
    assert tiny.same_bits(calls[-1], before if failing == 1 else average)
    made.compute_metrics = None
    assert math.isfinite(made.evaluate()["eval_ema_loss"])


@pytest.mark.parametrize("failing", [1, 2])
def test_also_during_training(tmp_path: Path, failing: int) -> None:
    calls = []

    def fails(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(tiny.parameters(made.model))
        if len(calls) == failing:
            raise ZeroDivisionError("a metric")
        return {}

    made = bert_run(tmp_path, compute_metrics=fails, eval_strategy="steps", eval_steps=4)
    with pytest.raises(ZeroDivisionError, match="a metric"):
        made.train()
    student, average = made.recorder.weights[-1], made.recorder.averages[-1]
    assert made.state.global_step == len(made.recorder.weights) > 1 and not tiny.same_bits(student, average)
    assert tiny.same_bits(tiny.parameters(made.model), student)
    assert tiny.same_bits(tiny.average(made), average)
    assert tiny.same_bits(calls[-1], student if failing == 1 else average)


def test_ctc_predictions_are_greedy_labels(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []
    made = tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(tmp_path),
        tiny.speech(8),
        eval_dataset=tiny.speech(5, 3),
        compute_metrics=lambda prediction: seen.append(prediction) or {},  # type: ignore[func-returns-value]
    )
    made.evaluate()
    data = tiny.speech(5, 3)
    model = tiny.wav2vec2().eval()
    for row, predicted, reference in zip(data, seen[0].predictions, seen[0].label_ids, strict=True):
        best = model(torch.tensor(row["input_values"])[None]).logits[0].argmax(-1).tolist()
        merged = [token for i, token in enumerate(best) if token != 0 and (i == 0 or best[i - 1] != token)]
        assert [token for token in predicted.tolist() if token != -100] == merged
        assert [token for token in reference.tolist() if token != -100] == row["labels"].tolist()


# ---- Best model


@pytest.mark.parametrize("metric", ["eval_loss", "eval_ema_loss", "ema_loss", "eval_a_loss", "eval_ema_a_loss"])
def test_the_best_model_scores_exactly_the_best_metric(tmp_path: Path, metric: str) -> None:
    """Greater is called better, so that the first checkpoint is the best and loading it is seen."""
    named = "_a_" in metric
    made = bert_run(
        tmp_path,
        eval_dataset={"a": DEV["a"], "b": DEV["b"]} if named else DEV["a"],
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = {entry["step"]: entry[key] for entry in made.state.log_history if key in entry}
    step = max(values, key=lambda at: values[at])
    assert best.name == f"checkpoint-{step}" and step < 6
    assert made.state.best_metric == values[step]
    scores = made.evaluate()
    assert scores[key] == made.state.best_metric
    student = {entry["step"]: entry for entry in made.state.log_history if key in entry}[step]
    other = key.replace("ema_", "") if "ema" in metric else key.replace("eval_", "eval_ema_", 1)
    assert scores[other] == student[other]
    folder = best / "ema" if "ema" in metric else best
    model = BertForSequenceClassification.from_pretrained(folder)
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(model))
    made.save_model(str(tmp_path / "saved"))
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(model))
    for saved, kept in ((tmp_path / "saved", best), (tmp_path / "saved" / "ema", best / "ema")):
        pair = [tiny.parameters(BertForSequenceClassification.from_pretrained(at)) for at in (saved, kept)]
        assert tiny.same_bits(*pair)
    average = BertForSequenceClassification.from_pretrained(best / "ema")
    assert tiny.same_bits(
        {name: tiny.average(made)[name] for name in tiny.parameters(average)}, tiny.parameters(average)
    )


# ---- Save


def test_rotation_takes_both_and_meets_complete_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotated: list[bool] = []
    rotate = transformers.trainer.rotate_checkpoints

    def spy(*args: Any, **kwargs: Any) -> None:
        newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        rotated.append((newest / "ema/ema_state.json").is_file() and (newest / "ema/model.safetensors").is_file())
        rotate(*args, **kwargs)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", spy)
    made = bert_run(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    made.train()
    assert rotated == [True] * 6
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["checkpoint-5", "checkpoint-6"]
    assert sorted(path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("ema_state.json")) == folders


def test_save_model_writes_student_and_average(tmp_path: Path) -> None:
    made = bert_run(tmp_path / "run")
    made.train()
    made.save_model(str(tmp_path / "out"))
    for folder, weights in (("out", tiny.parameters(made.model)), ("out/ema", tiny.average(made))):
        loaded = tiny.parameters(BertForSequenceClassification.from_pretrained(tmp_path / folder))
        assert tiny.same_bits(loaded, {name: weights[name] for name in loaded})
    made.save_model()
    assert (tmp_path / "run/ema/model.safetensors").is_file()


def test_saving_before_training_saves_the_student_alone(tmp_path: Path) -> None:
    bert_run(tmp_path).save_model(str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out/ema").exists()


# ---- A second train()


def test_a_second_train_restarts_the_clock_and_continues_the_average(tmp_path: Path) -> None:
    made = bert_run(tmp_path, max_steps=8, kappa=4.0, small_batch_until=4)
    made.train()
    assert made.state.global_step == 5 and made.average.num_updates == 5
    student, average = tiny.parameters(made.model), tiny.average(made)
    before = made.average
    made.train()
    recorder = made.recorder
    assert made.average is before and made.average.num_updates == 10
    assert made.state.global_step == 5 and made.state.max_steps == 5
    assert made.drawn[5:] == made.drawn[:5]
    assert tiny.same_bits(recorder.initial, student)
    expected = {name: 0.9 * average[name].double() + 0.1 * recorder.weights[5][name].double() for name in student}
    assert tiny.difference(expected, {name: recorder.averages[5][name] for name in student}) < 1e-6
    # Adam's state was scaled for kappa 4 and goes back to 1: step 4 / 4 + 1 = 2, then * 4 + 1.
    assert [float(recorder.after[t]["classifier.bias"]["step"]) for t in (3, 4, 5)] == [4.0, 2.0, 9.0]
    assert recorder.groups[5] == recorder.groups[0]


def test_new_parameters_get_a_new_average_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = bert_run(tmp_path, model_init=lambda: tiny.bert(), max_steps=4)
    made.train()
    first = made.average
    transformers.utils.logging.enable_propagation()
    try:
        made.train()
    finally:
        transformers.utils.logging.disable_propagation()
    assert "the average is rebuilt" in caplog.text
    assert made.average is not first and made.average.num_updates == 4
    recorder = made.recorder
    assert tiny.same_bits(recorder.weights[4:], recorder.weights[:4])
    assert tiny.same_bits(recorder.averages[4:], recorder.averages[:4])


def test_a_second_train_after_loading_the_best_average_starts_from_it(tmp_path: Path) -> None:
    made = bert_run(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="ema_loss",
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    made.train()
    best = tiny.average(made)
    made.train()
    assert tiny.same_bits({name: best[name] for name in made.recorder.initial}, made.recorder.initial)


# ---- Other models


class Line(nn.Module):
    """Not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.line(input_ids.float() / 20))


def test_a_plain_module_with_its_own_loss(tmp_path: Path) -> None:
    def loss(model: nn.Module, inputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    gradients = {}
    for micro in (8, 3):
        torch.manual_seed(0)
        made = tiny.trainer(
            Line(),  # type: ignore[arg-type]
            tiny.arguments(tmp_path, reference_batch_size=8, per_device_train_batch_size=micro, save_strategy="steps"),
            tiny.sentences(20),
            example_loss=loss,
            data_collator=transformers.default_data_collator,
        )
        made.train()
        gradients[micro] = made.recorder.gradients
    assert tiny.difference(gradients[8][0], gradients[3][0]) < 1e-6
    assert (tmp_path / "checkpoint-4/ema/model.safetensors").is_file()


# ---- Trainer's insides

RELIED_ON = {
    "_clip_grad_norm": ["self", "model"],
    "_finish_current_push": ["self"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_output_dir": ["self", "trial"],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_prepare_inputs": ["self", "inputs"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "_set_signature_columns_if_needed": ["self"],
    "create_optimizer": ["self", "model"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "evaluation_loop": [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "floating_point_ops": ["self", "inputs"],
    "get_eval_dataloader": ["self", "eval_dataset"],
    "get_train_dataloader": ["self"],
    "log": ["self", "logs", "start_time"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "set_initial_training_values": ["self", "args", "dataloader"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_transformers_still_has_the_parameters_that_are_relied_on(name: str) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == RELIED_ON[name]


def overrides(kind: type) -> dict[str, Any]:
    """What a class itself puts in the place of Trainer's methods; `train` passes on whatever it is given."""
    return {
        name: value
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and hasattr(Trainer, name) and name not in ("__init__", "train")
    }


def test_every_overridden_method_of_trainer_is_listed() -> None:
    parts = [kind for kind in EMATrainerMixin.__mro__ if kind.__module__.startswith("hf_ema_scaling")]
    assert len(parts) == 6
    found = [(name, value) for kind in parts for name, value in overrides(kind).items()]
    assert {"_save_checkpoint", "evaluation_loop", "training_step", "create_scheduler"} < {name for name, _ in found}
    for name, ours in found:
        assert name in RELIED_ON, name
        assert list(inspect.signature(ours).parameters) == RELIED_ON[name], name


@pytest.mark.parametrize("kind", [BYOLTrainer, EMASeq2SeqTrainer, EMATrainer, PseudoLabelSeq2SeqTrainer])
def test_the_trainers_override_no_private_method_of_trainer(kind: type) -> None:
    made_of = set(EMATrainerMixin.__mro__)
    own = [part for part in kind.__mro__ if part.__module__.startswith("hf_ema_scaling") and part not in made_of]
    assert kind in own
    assert not [name for part in own for name in overrides(part) if name.startswith("_")]


def test_the_number_of_samples_is_the_fourth_of_trainers_initial_values() -> None:
    """`set_initial_training_values` returns a plain tuple; its order is known from the names it is unpacked into."""
    source = inspect.getsource(Trainer._inner_training_loop)
    names = [line.strip() for line in source.split("= self.set_initial_training_values")[0].splitlines()[-8:-1]]
    assert names == [
        "num_train_epochs,",
        "num_update_steps_per_epoch,",
        "num_examples,",
        "num_train_samples,",
        "total_train_batch_size,",
        "steps_in_epoch,",
        "max_steps,",
    ]


def test_the_log_state_that_is_restored_is_set_before_training_begins() -> None:
    """`_tr_loss` and `_globalstep_last_logged` are Trainer's; resuming adds to them in `on_train_begin`."""
    source = inspect.getsource(Trainer._inner_training_loop)
    begin = source.index("on_train_begin")
    assert 0 < source.index("self._tr_loss = ") < begin and 0 < source.index("self._globalstep_last_logged = ") < begin
    assert "tr_loss -= tr_loss" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_trainers_state_is_written_after_all_else_and_before_older_checkpoints_are_deleted() -> None:
    source = inspect.getsource(Trainer._save_checkpoint)
    order = [
        "save_model(",
        "_save_optimizer_and_scheduler(",
        "_save_scaler(",
        "_save_rng_state(",
        "state.save_to_json(",
    ]
    places = [source.index(name) for name in (*order, "_push_from_checkpoint(", "rotate_checkpoints(")]
    assert places == sorted(places) and source.count("save_to_json(") == 1
