"""The BYOL recipe: from YAML to saved models and a probe, on images of a folder and on digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from hf_ema_scaling.recipe import BYOL, build_byol, parse, run
from hf_ema_scaling.recipe.images import load_images
from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.byol_model import BYOLModel
from hf_ema_scaling.training.self_check import FAILED, SKIPPED, self_check

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "byol_digits.yaml"
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}


def save_images(folder: Path, count: int, labels: Callable[[int], int] = lambda row: row % 3) -> Path:
    """A saved data set of noise in colour."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": [labels(row) for row in range(count)]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(folder))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML file of a recipe that takes four steps."""
    values = {
        "recipe": "byol",
        "images": str(save_images(tmp_path / "images", 17)),
        "evaluation": str(tmp_path / "images"),
        "image_size": 8,
        "encoder_channels": [3, 4],
        "hidden_size": 6,
        "projection_size": 5,
        "rotation": 20,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.05,
        "ema_momentum": 0.9,
        "ema_momentum_schedule": "cosine",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def build(config: Path, output: Path, *argv: str) -> BYOLTrainer:
    return build_byol(*parse(BYOL, ["--config", str(config), "--output_dir", str(output), *argv], ignored=("recipe",)))


def test_four_reference_steps_from_yaml_to_the_saved_models(config: Path, tmp_path: Path) -> None:
    trainer = build(config, tmp_path / "run", "--kappa", "2", "--small_batch_until", "2")
    metrics = run(trainer)
    assert (metrics["optimizer_steps"], metrics["reference_steps"]) == (3, 4)
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for key in ("eval_probe_accuracy", "eval_ema_probe_accuracy", "eval_loss", "eval_ema_loss"):
        assert saved[key] == metrics[key]
    plan = json.loads((tmp_path / "run" / "scaling_plan.json").read_text())
    assert plan["recipe"]["sgd_momentum"] == 0.9 and plan["steps"] == 3
    student, average = (
        BYOLModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "run", tmp_path / "run" / "ema")
    )
    assert all(torch.equal(value, student[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.average is not None
    assert all(torch.equal(value, average[name]) for name, value in trainer.average.tensors().items())
    assert any(not torch.equal(student[name], average[name]) for name in student)


def test_labels_never_reach_the_loss(config: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "other", 17, labels=lambda row: (row * 7) % 5)
    weights = []
    for folder in ("images", "other"):
        source = ("--images", str(tmp_path / folder), "--evaluation", str(tmp_path / folder))
        trainer = build(config, tmp_path / "run", *source, "--eval_strategy", "steps", "--eval_steps", "2")
        assert set(trainer.train_dataset[0]) == {"pixel_values"}
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    trainer = build(config, tmp_path / "run", "--evaluation", "null", "--label_column", "nothing")
    trainer.train()
    assert all(torch.equal(weights[0][name], value) for name, value in trainer.model.state_dict().items())


def test_init_seed_shares_the_start_and_not_the_order(config: Path, tmp_path: Path) -> None:
    one, two = (build(config, tmp_path, "--seed", seed, "--init_seed", "3") for seed in ("0", "1"))
    other = build(config, tmp_path, "--seed", "0")
    first = [made.model.encoder[0].weight for made in (one, two, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    orders = [made.sampler.stream.index.tolist() for made in (one, two, other)]
    assert orders[0] != orders[1] and orders[0] == orders[2]


def test_check_finds_nothing_wrong(config: Path, tmp_path: Path) -> None:
    results = {found.name: found for found in self_check(lambda: build(config, tmp_path))}
    assert not [found for found in results.values() if found.result == FAILED], results
    assert results["split"].result != SKIPPED and results["teacher"].result == "passed"


def test_a_transformers_encoder_from_scratch_or_pretrained(config: Path, tmp_path: Path) -> None:
    text = json.dumps({"model_type": "resnet", **RESNET})
    scratch = build(config, tmp_path, "--model_config", text)
    scratch.train()
    assert scratch.model.projector[0].in_features == 6
    torch.manual_seed(5)
    pretrained = ResNetModel(ResNetConfig(**RESNET))
    pretrained.save_pretrained(tmp_path / "resnet")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "do_resize": True}
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
    model: Any = build(config, tmp_path, "--model_name_or_path", str(tmp_path / "resnet")).model.eval()
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(processor[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = pretrained.eval()((pixels - mean) / std).pooler_output.flatten(1)
        torch.testing.assert_close(model(pixels).features, expected)


def test_images_are_resized_and_turned_grey(tmp_path: Path) -> None:
    for name in ("one", "zero"):
        folder = tmp_path / "folder" / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (5, 7), (30, 60, 90)).save(folder / "a.png")
    rows = load_images(f"{tmp_path / 'folder'}:train", size=4, channels=3)
    assert [row["labels"] for row in rows.__getitems__([0, 1])] == [0, 1]
    colours = torch.tensor([30, 60, 90])[:, None, None] / 255
    torch.testing.assert_close(rows[0]["pixel_values"], colours.expand(3, 4, 4))
    grey = load_images(f"{tmp_path / 'folder'}:train", size=2, channels=1)[0]["pixel_values"]
    # ITU-R 601-2 luma, as Pillow rounds it.
    torch.testing.assert_close(grey, torch.full((1, 2, 2), 54 / 255))


def test_digits_are_split_once_and_for_all() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = (load_images(f"digits:{split}", size=8, channels=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (1198, 599)
    for rows, place in ((test, 9), (train, 10)):
        row = rows[3 if rows is test else 6]
        torch.testing.assert_close(
            row["pixel_values"][0], torch.tensor(digits.images[place] * 15 / 255, dtype=torch.float32)
        )
        assert row["labels"] == digits.target[place]


@pytest.mark.parametrize(
    ("source", "more", "error", "message"),
    [
        ("digits", {}, ValueError, "digits:train and digits:test, got ''"),
        ("digits:test", {"size": 32}, ValueError, "image_size 8 with 1 channel, got 32 with 1"),
        ("./nowhere", {}, FileNotFoundError, "./nowhere: no such folder"),
        ("saved", {"image_column": "picture"}, ValueError, "no column picture; it has image, label"),
        ("saved", {"image_column": "label"}, ValueError, "not images"),
        ("saved", {"label_column": "image"}, ValueError, "not classes"),
        ("saved:train", {}, ValueError, "has no splits, so there is no .train. in it"),
    ],
)
def test_sources_that_cannot_be_used(
    tmp_path: Path, source: str, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    if source.startswith("saved"):
        source = str(save_images(tmp_path / "saved", 2)) + source.removeprefix("saved")
    with pytest.raises(error, match=message):
        load_images(source, **{"size": 8, "channels": 1, **more})


def test_the_digits_recipe_parses_and_its_comments_are_right() -> None:
    argv = ["--config", str(CONFIG), "--output_dir", "o"]
    data, _, views, args = parse(BYOL, argv, ignored=("recipe",))
    assert CONFIG.read_text().startswith("recipe: byol\n")
    assert (data.image_size, data.num_channels) == (8, 1)
    assert args.half_life(1.0) == pytest.approx(4425, abs=1)
    assert views.build().flip == 0
    assert args.per_device_train_batch_size == args.reference_batch_size
