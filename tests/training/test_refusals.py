"""What would train wrongly without a word is refused, by name and before the first step where that is possible."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from hf_ema_scaling import EMATrainer, WeightAverage
from hf_ema_scaling.training.diagnostics import LabelStatistics
from hf_ema_scaling.training.sharded import check_optimizer_state, refuse_sharding


def processor(folder: Path, tokens: list[str]) -> Wav2Vec2Processor:
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(path), pad_token="[PAD]", unk_token="[UNK]", bos_token=None, eos_token=None, word_delimiter_token="|"
    )
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


def test_a_blank_that_is_not_the_tokenizers_padding_is_refused(tmp_path: Path) -> None:
    last = processor(tmp_path, [*"abcde", "|", "[UNK]", "x", "[PAD]"])
    with pytest.raises(ValueError, match=r"id 0 \(model.config.pad_token_id\), the padding of the tokenizer id 8"):
        EMATrainer(tiny.wav2vec2(), tiny.arguments(tmp_path), train_dataset=tiny.speech(4), processing_class=last)
    model = tiny.wav2vec2()
    model.config.pad_token_id = 8
    EMATrainer(model, tiny.arguments(tmp_path), train_dataset=tiny.speech(4), processing_class=last)


def test_a_schedule_free_optimizer_is_refused(tmp_path: Path) -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = tiny.bert()
    optimizers = ScheduleFree(model.parameters(), lr=0.1), None
    args = tiny.arguments(tmp_path, scaling_rule="none")
    with pytest.raises(ValueError, match="ScheduleFree keeps an average of its own"):
        EMATrainer(model, args, train_dataset=tiny.sentences(4), optimizers=optimizers)


def test_ctc_rows_that_nobody_can_pad_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs processing_class=processor"):
        EMATrainer(tiny.wav2vec2(), tiny.arguments(tmp_path), train_dataset=tiny.speech(4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, tiny.VOCABULARY], r"holds the token 9, outside the vocabulary of 9"),
        ([1, 0, 2], r"holds the token 0, the blank, which is no target"),
    ],
)
def test_tokens_that_ctc_cannot_emit_are_refused(tmp_path: Path, labels: list[int], message: str) -> None:
    data = tiny.speech(4).map(
        lambda row, index: {"labels": labels if index == 3 else row["labels"]}, with_indices=True
    )
    made = tiny.trainer(tiny.wav2vec2(), tiny.arguments(tmp_path), data)
    before = tiny.parameters(made.model)
    with pytest.raises(ValueError, match=f"labelled row 3 {message}"):
        made.train()
    assert tiny.same_bits(tiny.parameters(made.model), before)


@pytest.mark.parametrize("family", ["wav2vec2", "bert"])
def test_rows_without_labels_are_refused(tmp_path: Path, family: str) -> None:
    data = tiny.speech(4, labels=False) if family == "wav2vec2" else tiny.sentences(4).remove_columns("labels")
    made = tiny.trainer(getattr(tiny, family)(), tiny.arguments(tmp_path), data)
    with pytest.raises(ValueError, match="have no 'labels' after collating"):
        made.train()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_accumulation_kwargs": {"num_steps": 4}}, "gradient accumulation over 4 batches"),
        ({"split_batches": True}, "split_batches"),
        ({"dispatch_batches": True}, "dispatch_batches"),
    ],
)
def test_accelerate_cannot_cut_the_steps_up(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    args = tiny.arguments(tmp_path, accelerator_config=config)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tiny.bert(), args, tiny.sentences(8))


def test_evaluation_sets_cannot_take_the_averages_name(tmp_path: Path) -> None:
    for name in ("ema", "ema_dev"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            tiny.trainer(
                tiny.bert(), tiny.arguments(tmp_path), tiny.sentences(8), eval_dataset={name: tiny.sentences(4)}
            )


@pytest.mark.parametrize(
    ("which", "metric"), [("ema", "eval_loss"), ("ema", None), ("student", "eval_ema_loss"), ("student", "ema_wer")]
)
def test_a_metric_that_is_never_measured_is_refused(tmp_path: Path, which: str, metric: str | None) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="is never measured with evaluate_weights"):
        tiny.arguments(tmp_path, evaluate_weights=which, metric_for_best_model=metric, **best)


def test_a_batch_below_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a batch of 0\.4 samples \(kappa=0\.1\) cannot be drawn"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, kappa=0.1), tiny.sentences(8))


def test_after_load_best_by_the_average_predictions_are_the_averages(tmp_path: Path) -> None:
    args = tiny.arguments(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(12), eval_dataset=tiny.sentences(6, 1))
    made.train()
    assert tiny.same_bits(tiny.parameters(made.model), tiny.average(made))
    found = made.predict(tiny.sentences(6, 1))
    with torch.no_grad():
        rows = torch.as_tensor(tiny.sentences(6, 1)["input_ids"][:])
        expected = made.model.eval()(input_ids=rows).logits
    assert torch.allclose(torch.as_tensor(found.predictions), expected, atol=1e-6)
    assert found.metrics["test_loss"] != found.metrics["test_ema_loss"]


def test_the_epoch_weight_counts_passes_that_unlabelled_data_makes_longer(tmp_path: Path) -> None:
    values = {"ema_momentum": None, "ema_epoch_weight": 0.5, "max_steps": 40}
    alone = tiny.trainer(tiny.wav2vec2(), tiny.arguments(tmp_path, **values), tiny.speech(20))
    assert alone.plan.recipe.ema_momentum**5 == pytest.approx(0.5, rel=1e-12)
    shared = tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(tmp_path, **values),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=5, unlabeled_ratio=3.0),
    )
    assert shared.plan.recipe.ema_momentum**20 == pytest.approx(0.5, rel=1e-12)


def test_counts_of_labels_are_saved_for_all_processes() -> None:
    mine = LabelStatistics()
    mine.since_log.counts["rows"] = 300
    state = mine.state_dict(lambda one: [one] * 4)
    assert state["since_log"]["counts"]["rows"] == 1200
    resumed = LabelStatistics()
    resumed.load_state_dict(state)
    assert resumed.counts["rows"] == 1200


class _Plugin:
    def __init__(self, **values: int) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("attributes", "plugin", "message"),
    [
        ({"is_deepspeed_enabled": True}, {"deepspeed_plugin": _Plugin(zero_stage=3)}, "ZeRO-3 partitions the param"),
        ({"is_deepspeed_enabled": True}, {"deepspeed_plugin": _Plugin(zero_stage=2)}, "ZeRO-2: DeepSpeed steps its"),
        ({"is_fsdp_enabled": True}, {"fsdp_plugin": _Plugin(fsdp_version=1)}, "set fsdp_version: 2"),
        ({"is_fsdp_xla_enabled": True}, {}, "FSDP of XLA"),
    ],
)
def test_shardings_that_cannot_be_averaged_are_refused_by_name(
    tmp_path: Path, attributes: dict[str, bool], plugin: dict[str, _Plugin], message: str
) -> None:
    made = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), tiny.sentences(8))
    made.accelerator = SimpleNamespace(state=SimpleNamespace(**plugin))
    for name, value in attributes.items():
        setattr(made, name, value)
    with pytest.raises(NotImplementedError, match=message):
        refuse_sharding(made)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 2, "cp_size": 1}, "tp_size=2: only data parallelism"),
        ({"tp_size": 2, "cp_size": 4, "sp_size": 1}, "tp_size=2, cp_size=4: only data parallelism"),
        ({"sp_size": 2}, "sp_size=2: only data parallelism is supported, so that each process draws a share"),
    ],
)
def test_what_is_not_data_parallelism_is_refused(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    made = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), tiny.sentences(8))
    copies = _Plugin(dp_replicate_size=2, dp_shard_size=2, tp_size=1)
    made.accelerator = SimpleNamespace(state=SimpleNamespace(), parallelism_config=copies)
    refuse_sharding(made)
    made.accelerator.parallelism_config = _Plugin(**sizes)
    with pytest.raises(NotImplementedError, match=message):
        refuse_sharding(made)


def test_fsdp2_of_accelerate_is_not_refused_but_layer_drop_is(tmp_path: Path) -> None:
    made = tiny.trainer(tiny.wav2vec2(layerdrop=0.1), tiny.arguments(tmp_path), tiny.speech(4))
    made.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=_Plugin(fsdp_version=2)), scaler=None)
    made.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="Wav2Vec2ForCTC has no input embeddings"):
        refuse_sharding(made)
    made.model.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"layerdrop=0\.1 \(the model's configuration\) under FSDP2"):
        refuse_sharding(made)
    made.model.config.layerdrop = 0.0
    refuse_sharding(made)


def test_optimizer_states_have_other_names_under_fsdp2(tmp_path: Path) -> None:
    for enabled, name in ((False, "optimizer.pt"), (True, "optimizer.bin"), (True, "optimizer_0")):
        folder = tmp_path / name
        folder.mkdir()
        trainer: Any = SimpleNamespace(is_fsdp_enabled=enabled)
        with pytest.raises(ValueError, match="holds no optimizer state"):
            check_optimizer_state(trainer, str(folder))
        (folder / name).touch()
        check_optimizer_state(trainer, str(folder))


def test_fsdp1_is_refused_by_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(torch.nn.Linear):
        pass

    monkeypatch.setattr("hf_ema_scaling.ema.sharding.FullyShardedDataParallel", Wrapped)
    with pytest.raises(NotImplementedError, match="FSDP1"):
        WeightAverage(torch.nn.Sequential(Wrapped(2, 2)))
