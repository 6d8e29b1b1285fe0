"""Training runs of models with PEFT adapters: the trainers, and the callback in a stock Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapted
import pytest
import tiny
import torch
from adapted import KINDS, lora_bert, lora_wav2vec2, trained
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ema_scaling import EMACallback
from hf_ema_scaling.ema import WeightAverage

peft = pytest.importorskip("peft")
STEPS = 6


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def supervised(folder: Path, kind: str, seed: int = 1, **changes: Any) -> Any:
    values = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps"}
    return tiny.trainer(
        lora_bert(kind, seed=seed),
        tiny.arguments(folder, **(values | changes)),
        tiny.sentences(24),
        eval_dataset=tiny.sentences(8, 1),
    )


def semi_supervised(folder: Path, kind: str, seed: int = 1, **changes: Any) -> Any:
    values = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
    return tiny.trainer(
        lora_wav2vec2(kind, seed=seed),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(12, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2, unlabeled_ratio=1.0),
        data_collator=tiny.CTCCollator(),
    )


RUNS = {"supervised": supervised, "semi_supervised": semi_supervised}


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        ("supervised", "get_peft_model"),
        ("supervised", "add_adapter"),
        ("semi_supervised", "get_peft_model"),
        pytest.param("semi_supervised", "add_adapter", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, run: str, kind: str) -> None:
    whole = RUNS[run](tmp_path / "whole", kind)
    whole.train()
    resumed = RUNS[run](tmp_path / "resumed", kind, seed=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert list(resumed.model.peft_config) == list(whole.model.peft_config)  # ema/ is no adapter of the student
    assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
    assert tiny.same_bits(tiny.average(resumed), tiny.average(whole))
    assert resumed.average.num_updates == whole.average.num_updates == STEPS
    assert resumed.average.gathered == whole.average.gathered == pytest.approx(1 - 0.9**STEPS)
    assert not whole.average.equals(whole.model)
    last = whole.recorder
    for name in trained(whole.model):  # the closed form over the students after each step
        expected = sum(0.1 * 0.9 ** (STEPS - 1 - i) * w[name].double() for i, w in enumerate(last.weights))
        torch.testing.assert_close(last.averages[-1][name].double(), expected / (1 - 0.9**STEPS), rtol=0, atol=1e-6)


KINDS_WITH_CONSTANTS = {  # tensors that are neither trained nor part of the average
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=STEPS, tinit=1, tfinal=1, deltaT=1, target_modules=["q_proj", "v_proj"]
    ),
}


class Allocation(TrainerCallback):
    """Gives up ranks as AdaLoRA's loop is to do after every step."""

    def on_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(args[1].global_step)


@pytest.mark.parametrize("kind", KINDS_WITH_CONSTANTS)
def test_other_kinds_of_adapters_label_save_and_resume(tmp_path: Path, kind: str) -> None:
    def made(folder: str, seed: int) -> Any:
        torch.manual_seed(seed)
        run = semi_supervised(tmp_path / folder, "get_peft_model")
        run.model = run.model_wrapped = peft.get_peft_model(tiny.wav2vec2(), KINDS_WITH_CONSTANTS[kind]())
        run.add_callback(Allocation())
        return run

    whole = made("whole", 1)
    whole.train()
    last = tmp_path / "whole" / f"checkpoint-{STEPS}" / "ema/adapter"
    loaded = peft.PeftModel.from_pretrained(tiny.wav2vec2(), last).eval()
    inputs = {"input_values": torch.sin(torch.arange(256.0).view(2, 128) ** 1.5)}
    whole.model.eval()
    with torch.no_grad(), whole.average.swapped(whole.model):
        averaged = whole.model(**inputs).logits
    assert torch.equal(loaded(**inputs).logits, averaged) and not torch.equal(averaged, whole.model(**inputs).logits)
    torch.testing.assert_close(whole.teacher(**inputs).logits, averaged, rtol=1e-5, atol=1e-6)
    if kind == "AdaLoRA":
        assert whole.model.peft_config["default"].rank_pattern  # PEFT itself cannot load what Trainer saved then
        return
    resumed = made("resumed", 7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
    assert tiny.same_bits(tiny.average(resumed), tiny.average(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_come_from_the_average(tmp_path: Path, kind: str) -> None:
    made = semi_supervised(tmp_path, kind)
    made.train()
    row = made.data_collator([tiny.speech(1, 9, labels=False)[0]])
    inputs = {name: torch.as_tensor(value) for name, value in row.items() if name != "labels"}
    labels = made.teacher(**inputs).logits
    made.model.eval()
    with torch.no_grad():
        student = made.model(**inputs).logits
        with made.average.swapped(made.model):
            averaged = made.model(**inputs).logits
    torch.testing.assert_close(labels, averaged, rtol=1e-4, atol=1e-5)
    assert float((labels - student).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_average_is_loaded_as_it_was_scored(tmp_path: Path, kind: str) -> None:
    made = supervised(
        tmp_path,
        kind,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        learning_rate=0.3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        greater_is_better=False,
    )
    made.train()
    scores = {entry["step"]: entry["eval_ema_loss"] for entry in made.state.log_history if "eval_ema_loss" in entry}
    best = min(scores, key=scores.__getitem__)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert tiny.same_bits(
        {n: t for n, t in tiny.average(made).items() if n in made.recorder.averages[best - 1]},
        made.recorder.averages[best - 1],
    )
    assert made.evaluate()["eval_ema_loss"] == pytest.approx(scores[best], abs=1e-7)
    assert made.average.equals(made.model)


def test_the_average_of_a_finished_run_is_an_adapter_beside_the_students(tmp_path: Path) -> None:
    made = supervised(tmp_path, "get_peft_model", save_strategy="no")
    made.train()
    made.save_model()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    student, average = (
        peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / place).eval() for place in (".", "ema/adapter")
    )
    made.model.eval()
    assert torch.equal(student(**inputs).logits, made.model(**inputs).logits)
    with made.average.swapped(made.model):
        assert torch.equal(average(**inputs).logits, made.model(**inputs).logits)
    assert not torch.equal(student(**inputs).logits, average(**inputs).logits)


def test_the_callback_resumes_adapters_in_a_stock_trainer(tmp_path: Path) -> None:
    def run(folder: Path, seed: int) -> tuple[Trainer, EMACallback]:
        callback = EMACallback(momentum=0.9, reference_batch_size=4)
        args = TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3,
            use_cpu=True, disable_tqdm=True, report_to="none", logging_strategy="no",
        )  # fmt: skip
        model = lora_bert(seed=seed)
        return Trainer(model, args, train_dataset=tiny.sentences(24), callbacks=[callback]), callback

    whole, average = run(tmp_path, 1)
    whole.train()
    resumed, again = run(tmp_path, 7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert list(resumed.model.peft_config) == ["default"]
    assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
    assert tiny.same_bits(dict(again.average.tensors()), dict(average.average.tensors()))
    assert again.average.gathered == average.average.gathered == pytest.approx(1 - 0.9**STEPS)
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    with average.averaged_weights():
        expected = whole.model.eval()(**inputs).logits.detach()
    torch.testing.assert_close(average.teacher(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    average.export(tmp_path / "export")
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "export/adapter").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_path_correction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="ema_correction='path'"):
        supervised(tmp_path, "get_peft_model", ema_correction="path")


def test_a_wrong_adapter_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    made = supervised(tmp_path / "a", "add_adapter", max_steps=3)
    made.train()
    other = supervised(tmp_path / "b", "add_adapter")
    other.model = adapted.adapt(tiny.bert(), "add_adapter", modules_to_save=None, target_modules=["query", "key"])
    with pytest.raises(ValueError, match="do not match"):
        other._load_from_checkpoint(str(tmp_path / "a/checkpoint-3"))
    assert WeightAverage(other.model).gathered == 0.0
