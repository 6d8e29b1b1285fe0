"""`EMACallback` in sentence-transformers' trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from stock_runs import RHO, Recorder, callback, clones, same, tokenizer
from transformers import BertConfig, BertModel

from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.hub import stage
from hf_ema_scaling.hub.run_folder import RunFolderError

st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

pytestmark = pytest.mark.filterwarnings("ignore:EMACallback scales only the momentum")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=43,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def encoder(backbone: str) -> Any:
    torch.manual_seed(0)
    transformer = modules.Transformer(backbone)
    return st.SentenceTransformer(modules=[transformer, modules.Pooling(8), modules.Dense(8, 4)], device="cpu")


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(40)}" for _ in range(rng.randint(3, 9))) for _ in range(count)]


def pairs(count: int = 64) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"anchor": sentences(count, 0), "positive": sentences(count, 1)})


def labelled(count: int = 64) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"sentence": sentences(count, 0), "label": [i % 8 for i in range(count)]})


def fit(folder: Path, model: Any, data: Any, loss: Any, *callbacks: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "no",
    }
    args = st.SentenceTransformerTrainingArguments(str(folder), **(settings | changes))
    return st.SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss(model), callbacks=list(callbacks))


@pytest.mark.parametrize(
    ("data", "loss", "changes", "kappa"),
    [
        pytest.param(
            pairs, "MultipleNegativesRankingLoss", {"batch_sampler": "no_duplicates"}, 1.0, marks=pytest.mark.slow
        ),
        pytest.param(
            labelled, "BatchAllTripletLoss", {"batch_sampler": "group_by_label"}, 1.0, marks=pytest.mark.slow
        ),
        (
            lambda: datasets.DatasetDict(a=pairs(), b=pairs(20)),
            "MultipleNegativesRankingLoss",
            {"gradient_accumulation_steps": 2, "multi_dataset_batch_sampler": "round_robin"},
            2.0,
        ),
    ],
)
def test_sentence_embeddings_have_the_right_average(
    tmp_path: Path, backbone: str, data: Any, loss: str, changes: dict[str, Any], kappa: float
) -> None:
    average = callback()
    recorder, model, drawn = Recorder(average), encoder(backbone), []
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    run = fit(tmp_path / "run", model, data(), getattr(losses, loss), average, recorder, **changes)
    collate = run.data_collator

    class Counted:
        def __call__(self, rows: list[Any]) -> Any:
            drawn.append(len(rows))
            return collate(rows)

        def __getattr__(self, name: str) -> Any:
            return getattr(collate, name)

    run.data_collator = Counted()
    run.train()
    assert (average.kappa, average.clock, average.average.num_updates) == (kappa, 4 * kappa, 4)
    assert set(drawn[: int(4 * kappa)]) == {4}
    for student, shadow in zip(recorder.student, recorder.average, strict=True):
        for name in expected:
            expected[name] = RHO**kappa * expected[name] + (1 - RHO**kappa) * student[name].double()
            assert (shadow[name] - expected[name]).abs().max() < 1e-6
    assert average.average.distance(model) > 1e-3

    resumed = callback()
    again = fit(tmp_path / "run", encoder(backbone), data(), getattr(losses, loss), resumed, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(clones(resumed), clones(average))


def test_the_average_is_exported_as_a_sentence_transformer(tmp_path: Path, backbone: str) -> None:
    average, model = callback(), encoder(backbone)
    loss = losses.MultipleNegativesRankingLoss
    fit(tmp_path / "run", model, pairs(), loss, average, save_strategy="no").train()
    student = {name: p.detach().clone() for name, p in model.named_parameters()}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    average.export(tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
    assert not (tmp_path / "export" / "old").exists()
    loaded = st.SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert average.average.equals(loaded) and not average.average.equals(model)
    assert all(torch.equal(p, student[name]) for name, p in model.named_parameters())
    model.eval()
    with average.averaged_weights():
        expected = model.encode(["w1 w2", "w3"])
    assert (loaded.encode(["w1 w2", "w3"]) == expected).all()
    teacher = EMATeacher(model, average.average, factory=lambda: encoder(backbone))
    assert (teacher.module.encode(["w1 w2", "w3"]) == expected).all()
    assert not (model.encode(["w1 w2", "w3"]) == expected).all()


def test_weights_in_a_checkpoint_fit_the_model_and_no_other_layout_is_pushed(tmp_path: Path, backbone: str) -> None:
    average, model = callback(), encoder(backbone)
    run = fit(tmp_path / "run", model, pairs(), losses.MultipleNegativesRankingLoss, average)
    run.train()
    run.save_model()
    average.export(tmp_path / "run" / "ema")
    loaded = st.SentenceTransformer(str(tmp_path / "run" / "checkpoint-4"), device="cpu")
    assert not average.average.equals(loaded)
    loaded.load_state_dict(load_file(tmp_path / "run" / "checkpoint-4" / "ema" / "model.safetensors"))
    assert average.average.equals(loaded)
    for folder in ("run", "run/checkpoint-4"):
        with pytest.raises(RunFolderError, match=r"sentence-transformers \(modules.json\).*push_to_hub"):
            stage(tmp_path / folder, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()
