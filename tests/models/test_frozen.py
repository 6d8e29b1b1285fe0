"""Frozen parameters: referred to and not copied, also when they are unfrozen or frozen in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_ema_scaling import EMACallback
from hf_ema_scaling.ema import EMATeacher, WeightAverage, load_average, save_average

INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def half_frozen(dtype: torch.dtype = torch.float32, seed: int = 0) -> BertForSequenceClassification:
    model = tiny.bert(seed=seed).to(dtype)
    model.bert.embeddings.requires_grad_(False)
    return model


def shake_(model: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_frozen_layers_are_not_copied_and_the_average_is_a_whole_model(tmp_path: Path) -> None:
    model = half_frozen()
    average = WeightAverage(model)
    assert average.references == frozen_names(model) and len(average.references) == 5
    for name, parameter in model.named_parameters():
        assert (average.tensors()[name].data_ptr() == parameter.data_ptr()) == (name in average.references)
    teacher = EMATeacher(model, average)
    for _ in range(3):
        shake_(model)
        average.update(model, 0.9)
    assert average.references == frozen_names(model)
    save_average(tmp_path, model, average, state={})
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    with average.swapped(model):
        model.eval()
        expected = model(**INPUTS).logits.detach().clone()
    torch.testing.assert_close(loaded.eval()(**INPUTS).logits.detach(), expected)
    torch.testing.assert_close(teacher(**INPUTS).logits, expected)

    fresh = half_frozen()
    other = WeightAverage(fresh)
    load_average(tmp_path, fresh, other)
    assert other.references == average.references  # equal to what was saved: still the student's own
    assert tiny.same_bits(dict(other.tensors()), dict(average.tensors()))


def test_in_half_precision_frozen_layers_stay_in_the_averages_dtype() -> None:
    """Modules do not compute with float32 input and bfloat16 weights."""
    model = half_frozen(torch.bfloat16)
    average = WeightAverage(model)
    assert not average.references and {t.dtype for t in average.tensors().values()} == {torch.float32}
    shake_(model)
    average.update(model, 0.9)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(average.tensors()[name], model.get_parameter(name).float())
    assert EMATeacher(model, average)(**INPUTS).logits.dtype == torch.float32


def test_an_unfrozen_parameter_is_averaged_from_the_value_it_was_frozen_at() -> None:
    model = half_frozen()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    weight = model.bert.embeddings.word_embeddings.weight
    name, start = "bert.embeddings.word_embeddings.weight", weight.detach().clone()
    weight.requires_grad_(True)
    average.prepare(model)
    assert name not in average.references
    with torch.no_grad():
        weight.add_(1.0)
    average.update(model, 0.9)
    torch.testing.assert_close(average.tensors()[name], start + 0.1)
    torch.testing.assert_close(teacher.module.get_parameter(name), start + 0.1)
    # Without `prepare` it begins where the first step has led; never with a tensor of the student's.
    other = half_frozen()
    late = WeightAverage(other)
    moved = other.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    for expected in (1.0, 1.1):
        with torch.no_grad():
            moved.add_(1.0)
        late.update(other, 0.9)
        torch.testing.assert_close(late.tensors()[name], start + expected)
    assert late.tensors()[name].data_ptr() != moved.data_ptr()


def test_a_parameter_that_is_frozen_later_is_the_students_again() -> None:
    model = tiny.bert()
    average = WeightAverage(model)
    shake_(model)
    average.update(model, 0.9)
    assert not torch.equal(average.tensors()["classifier.weight"], model.classifier.weight)
    model.classifier.weight.requires_grad_(False)
    average.update(model, 0.9)
    assert torch.equal(average.tensors()["classifier.weight"], model.classifier.weight)
    assert not average.references  # its copy is there already, and may be needed again
    model.classifier.weight.requires_grad_(True)
    before = model.classifier.weight.detach().clone()
    shake_(model)
    average.update(model, 0.9)
    expected = 0.9 * before + 0.1 * model.classifier.weight.detach()
    torch.testing.assert_close(average.tensors()["classifier.weight"], expected)


def test_a_saved_average_never_overwrites_the_student() -> None:
    """A layer that was trained when the average was saved, and is frozen in the run that resumes it."""
    model = half_frozen()
    average = WeightAverage(model)
    name = "bert.embeddings.word_embeddings.weight"
    student = model.get_parameter(name).detach().clone()
    saved = {key: tensor.detach().clone() for key, tensor in average.tensors().items()}
    saved[name] += 1.0
    average.load(saved)
    assert torch.equal(model.get_parameter(name), student)
    assert torch.equal(average.tensors()[name], saved[name]) and name not in average.references
    average.update(model, 0.9)
    assert torch.equal(average.tensors()[name], student)
    average.load({key: tensor for key, tensor in saved.items() if key not in average.references})


def test_a_snapshot_keeps_frozen_parameters_too() -> None:
    model = half_frozen()
    snapshot = WeightAverage(model, share_frozen=False)
    before = tiny.parameters(model)
    assert not snapshot.references
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with snapshot.swapped(model):
        assert tiny.same_bits(tiny.parameters(model), before)


def test_another_model_is_followed_and_its_predecessor_left_alone() -> None:
    model, other = half_frozen(), half_frozen(seed=3)
    average = WeightAverage(model)
    before = tiny.parameters(model)
    average.update(other, 0.9)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(average.tensors()[name], other.get_parameter(name))
    assert tiny.same_bits(tiny.parameters(model), before)
    average.copy_to(model)
    assert torch.equal(model.get_parameter(name), other.get_parameter(name))


def test_a_model_that_is_frozen_throughout() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    average = WeightAverage(model)
    average.update(model, 0.9)
    assert average.distance(model) == 0.0 and average.fingerprint() == () and average.equals(model)
    assert average.references == {"weight", "bias"}


class Thaw(TrainerCallback):
    """Unfreezes the embeddings before the fourth step, and freezes the classifier."""

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step == 3:
            model.bert.embeddings.requires_grad_(True)
            model.classifier.requires_grad_(False)


def expected_average(seen: list[tiny.Tensors], initial: tiny.Tensors) -> tiny.Tensors:
    """Closed form of `Thaw`: embeddings average from step 4 on; the classifier is the student's from step 4 on."""
    result = {name: value.double() for name, value in initial.items()}
    for step, weights in enumerate(seen):
        for name, value in weights.items():
            fixed = name.startswith("bert.embeddings") if step < 3 else name.startswith("classifier")
            result[name] = value.double() if fixed else 0.9 * result[name] + 0.1 * value.double()
    return result


def thawing(folder: Path, seed: int = 0, **changes: Any) -> Any:
    model = half_frozen(seed=seed)
    args = tiny.arguments(folder, **({"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | changes))
    # The optimizer that Trainer makes knows only what is trainable at the start.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    more = {"eval_dataset": tiny.sentences(8, 1), "callbacks": [Thaw()], "optimizers": (optimizer, None)}
    return tiny.trainer(model, args, tiny.sentences(24), **more)


def test_a_run_that_unfreezes_and_freezes_layers(tmp_path: Path) -> None:
    made = thawing(tmp_path)
    made.train()
    seen, initial = made.recorder.weights, made.recorder.initial
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(seen[2][embeddings], initial[embeddings])
    assert not torch.equal(seen[3][embeddings], initial[embeddings])
    for name, value in expected_average(seen, initial).items():
        torch.testing.assert_close(made.recorder.averages[-1][name].double(), value, rtol=0, atol=1e-6)
    again = thawing(tmp_path, seed=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same_bits(tiny.parameters(again.model), tiny.parameters(made.model))
    assert tiny.same_bits(tiny.average(again), tiny.average(made))


def test_the_best_average_of_a_layer_that_was_frozen_after_it(tmp_path: Path) -> None:
    """At the best step the classifier's average lagged; when it is loaded the classifier is frozen."""
    made = thawing(tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, metric_for_best_model="eval_ema_loss")
    made.train()
    scores = next(entry for entry in made.state.log_history if entry["step"] == 2 and "eval_loss" in entry)
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    made._load_best_model()
    assert not made.model.classifier.weight.requires_grad
    assert tiny.same_bits(tiny.average(made), made.recorder.averages[1])
    assert tiny.same_bits(tiny.parameters(made.model), made.recorder.averages[1])
    again = made.evaluate()
    assert again["eval_ema_loss"] == scores["eval_ema_loss"] != again["eval_loss"] == scores["eval_loss"]
    with made._as_student():
        assert tiny.same_bits(tiny.parameters(made.model), made.recorder.weights[1])


class Seen(TrainerCallback):
    """The student after each step."""

    def __init__(self) -> None:
        self.weights: list[tiny.Tensors] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.weights.append(tiny.parameters(model))


def test_so_does_the_callback_in_a_stock_trainer(tmp_path: Path) -> None:
    average, seen, model = EMACallback(momentum=0.9, reference_batch_size=4), Seen(), half_frozen()
    initial = tiny.parameters(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, max_grad_norm=0, use_cpu=True, disable_tqdm=True,
        report_to="none", lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.3), None)
    callbacks = [average, seen, Thaw()]
    Trainer(model, args, train_dataset=tiny.sentences(24), callbacks=callbacks, optimizers=optimizers).train()
    for name, value in expected_average(seen.weights, initial).items():
        torch.testing.assert_close(average.average.tensors()[name].double(), value, rtol=0, atol=1e-6)
