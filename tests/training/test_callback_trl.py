"""`EMACallback` in TRL's `SFTTrainer`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from stock_runs import RHO, Recorder, callback, clones, same, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore:EMACallback scales only the momentum")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def texts(count: int = 64) -> list[str]:
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(40)}" for _ in range(rng.randint(3, 9))) for _ in range(count)]


def sft(
    folder: Path,
    average: Any,
    *more: Any,
    model: Any = None,
    data: Any = None,
    peft_config: Any = None,
    **changes: Any,
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "no",
    }
    return trl.SFTTrainer(
        llama() if model is None else model,
        trl.SFTConfig(str(folder), **(settings | changes)),
        train_dataset=datasets.Dataset.from_dict({"text": texts()}) if data is None else data,
        processing_class=tokenizer(),
        callbacks=[average, *more],
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    ("changes", "kappa"),
    [
        ({"gradient_accumulation_steps": 2}, 2.0),
        ({"packing": True}, 1.0),
        pytest.param({}, 1.0, marks=pytest.mark.slow),
        pytest.param({"padding_free": True, "max_length": None}, 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Padding-free", "ignore:You are using packing")
def test_supervised_fine_tuning_has_the_right_average(tmp_path: Path, changes: dict[str, Any], kappa: float) -> None:
    average = callback()
    recorder, drawn = Recorder(average), []
    run = sft(tmp_path / "run", average, recorder, save_strategy="steps", save_steps=2, **changes)
    expected = {name: p.detach().double() for name, p in run.model.named_parameters()}
    collate = run.data_collator

    def counted(rows: list[Any]) -> Any:
        drawn.append(len(rows))
        return collate(rows)

    run.data_collator = counted
    run.train()
    per_step = changes.get("gradient_accumulation_steps", 1)
    assert (average.kappa, average.clock, average.average.num_updates) == (kappa, 4 * kappa, 4)
    # The loader reads ahead, so it has drawn a batch or two that no step has used.
    assert set(drawn[: 4 * per_step]) == {4} and 4 * per_step == 4 * kappa
    for student, shadow in zip(recorder.student, recorder.average, strict=True):
        for name in expected:
            expected[name] = RHO**kappa * expected[name] + (1 - RHO**kappa) * student[name].double()
            assert (shadow[name] - expected[name]).abs().max() < 1e-6
    assert average.average.distance(run.model) > 1e-3

    resumed = callback()
    sft(tmp_path / "run", resumed, **changes).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(clones(resumed), clones(average))
    average.export(tmp_path / "export")
    assert average.average.equals(LlamaForCausalLM.from_pretrained(tmp_path / "export"))


def test_kappa_of_a_streamed_data_set(tmp_path: Path) -> None:
    average = callback()
    data = datasets.Dataset.from_dict({"text": texts()}).to_iterable_dataset()
    sft(tmp_path, average, data=data, max_steps=2, gradient_accumulation_steps=2).train()
    assert (average.kappa, average.clock, average.average.num_updates) == (2.0, 4.0, 2)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("draws", [{}, {"steps_per_generation": 4}])
def test_rows_that_are_drawn_for_several_batches_at_once_count_once(
    tmp_path: Path, kind: str, draws: dict[str, int]
) -> None:
    """The loader of these trainers has batches of 8 and 16 rows, of which a step takes 4 twice."""
    llama().save_pretrained(tmp_path / "model")
    average = callback()
    recorder = Recorder(average)
    config = getattr(trl, f"{kind}Config")(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=3,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        **draws,
    )
    run = getattr(trl, f"{kind}Trainer")(
        LlamaForCausalLM.from_pretrained(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts()}),
        processing_class=tokenizer(),
        callbacks=[average, recorder],
    )
    start = {name: p.detach().double() for name, p in run.model.named_parameters()}
    run.train()
    assert (average.kappa, average.clock, average.average.num_updates) == (2.0, 4.0, 2)
    for name, first in start.items():
        expected = RHO**2 * first + (1 - RHO**2) * recorder.student[0][name].double()
        assert (recorder.average[0][name] - expected).abs().max() < 1e-6


def test_an_adapter_trains_saves_and_resumes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    average = callback()
    run = sft(tmp_path, average, model=adapted(), save_strategy="steps", save_steps=2)
    run.train()
    kept = clones(average)
    frozen = {name: p for name, p in run.model.named_parameters() if not p.requires_grad}
    moving = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert len(frozen) > len(moving) == 2
    assert all(torch.equal(kept[name], p) for name, p in frozen.items() if name in kept)
    assert not any(torch.equal(kept[name], p) for name, p in moving.items())
    average.export(tmp_path / "export")
    assert (tmp_path / "export" / "ema_state.json").is_file()
    resumed = callback()
    sft(tmp_path, resumed, model=adapted()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(clones(resumed), clones(average))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_adapter_that_the_trainer_makes_of_a_peft_config(tmp_path: Path, accumulation: int) -> None:
    """The average is the mean of the students after each step, and nothing of the zeros that adapters start from."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    changes = {"gradient_accumulation_steps": accumulation, "learning_rate": 5e-2}
    average = callback()
    recorder = Recorder(average)
    run = sft(tmp_path, average, recorder, peft_config=config, save_strategy="steps", save_steps=2, **changes)
    run.train()
    rho = RHO**accumulation
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora" in name for name in trained)
    for done in range(1, 5):
        weights = [(1 - rho) * rho ** (done - 1 - i) / (1 - rho**done) for i in range(done)]
        for name in trained:
            seen = [student[name].double() for student in recorder.student[:done]]
            expected = sum(weight * student for weight, student in zip(weights, seen, strict=True))
            assert (recorder.average[done - 1][name] - expected).abs().max() < 1e-6, name
    assert average.average.gathered == pytest.approx(1 - rho**4, rel=1e-12)
    assert average.average.distance(run.model) > 1e-3
    # What is saved is an adapter for the base; a run that goes on from a checkpoint ends with the same bits.
    average.export(tmp_path / "export")
    loaded = dict(peft.PeftModel.from_pretrained(llama(), tmp_path / "export" / "adapter").named_parameters())
    assert all(torch.equal(loaded[name], recorder.average[-1][name]) for name in trained)
    resumed = callback()
    again = sft(tmp_path, resumed, peft_config=config, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(clones(resumed), clones(average)) and resumed.average.gathered == average.average.gathered
