"""BYOL: the average is the target, views belong to the stream, labels to the probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import ResNetConfig, ViTConfig

from hf_ema_scaling.data.images import ImageRows, RandomViews
from hf_ema_scaling.ema import DeadTeacherError, EMATeacher, WeightAverage
from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.byol_model import BYOLConfig, BYOLModel
from hf_ema_scaling.training.losses import byol_losses
from hf_ema_scaling.training.probe import probe_accuracy

VIEWS = RandomViews(min_scale=0.8, shift=0.1, rotation=20, contrast=0.3, brightness=0.1, noise=0.05, occlusion=0.3)


def images(count: int, seed: int = 0, labels: bool = False) -> ImageRows:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    classes = (pixels[:, 0, 2, 2] > 127).long() + (pixels[:, 0, 3, 3] > 127).long()
    return ImageRows(pixels.__getitem__, count, classes.tolist() if labels else None)


def network(seed: int = 0) -> BYOLModel:
    torch.manual_seed(seed)
    return BYOLModel(BYOLConfig(num_channels=1, encoder_channels=[3, 4], hidden_size=6, projection_size=5))


def build(folder: Path, *, views: Any = VIEWS, train: Any = None, model: Any = None, **changes: Any) -> Any:
    more = {key: changes.pop(key) for key in ("probe_dataset", "eval_dataset") if key in changes}
    values = {"max_steps": 8, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "ema_momentum": 0.7}
    recorder = tiny.Recorder()
    made: Any = BYOLTrainer(
        model or network(),
        tiny.arguments(folder, **(values | changes)),
        views=views,
        train_dataset=train or images(19),
        callbacks=[recorder],
        **more,
    )
    made.recorder, recorder.trainer = recorder, made
    return made


def trained(folder: Path, **changes: Any) -> Any:
    made = build(folder, **changes)
    made.train()
    return made


def micro_batch(rows: int = 4) -> Any:
    pixels = torch.stack([row["pixel_values"] for row in images(rows, 3).__getitems__(list(range(rows)))])
    return {
        "source": 0,
        "inputs": {"pixel_values": pixels},
        "positions": list(range(rows)),
        "indices": list(range(rows)),
        "weight": 1.0,
    }


# ---- Loss and target


def test_the_loss_is_the_distance_of_unit_vectors_across_views() -> None:
    rng = np.random.default_rng(0)
    predictions, targets = rng.standard_normal((2, 3, 2, 5))
    unit_p, unit_t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (predictions, targets))
    expected = ((unit_p[:, 0] - unit_t[:, 1]) ** 2).sum(-1) + ((unit_p[:, 1] - unit_t[:, 0]) ** 2).sum(-1)
    losses = byol_losses(torch.tensor(predictions), torch.tensor(targets))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
    same = torch.tensor(predictions)
    assert byol_losses(same, same.flip(1)).abs().max() < 1e-6
    assert byol_losses(same, -same.flip(1)).numpy() == pytest.approx(8.0)


def by_hand(made: Any, student: BYOLModel, batch: Any) -> Tensor:
    """The loss of a micro-batch from the parts of the student and of the average."""
    average = network(9)
    average.load_state_dict(made.average.tensors())
    average.eval().requires_grad_(False)
    student.train()
    seeds = [made.args.seed * 2**40 + position for position in batch["positions"]]
    one, two = (made.views(batch["inputs"]["pixel_values"], [2 * seed + view for seed in seeds]) for view in (0, 1))
    loss: Tensor = torch.zeros(())
    for view, other in ((one, two), (two, one)):
        p = student.predictor(student.projector(student.encoder(2 * view - 1)))
        t = average.projector(average.encoder(2 * other - 1))
        loss = loss + (2 - 2 * (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))).sum()
    return loss


def test_a_micro_batch_by_hand_and_no_gradient_reaches_the_target(tmp_path: Path) -> None:
    made = trained(tmp_path, seed=5)
    batch = micro_batch()
    copy = network(9)
    copy.load_state_dict(made.model.state_dict())
    expected = by_hand(made, copy, batch)
    expected.backward()
    made.model.train()
    made.model.zero_grad()
    loss = made.micro_batch_loss(made.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient, wanted = ({name: p.grad for name, p in m.named_parameters()} for m in (made.model, copy))
    assert tiny.difference(wanted, gradient) < 1e-5
    assert all(not p.requires_grad and p.grad is None for p in made.target().module.parameters())


def test_the_average_is_the_target(tmp_path: Path) -> None:
    made = trained(tmp_path)
    made.model.eval()
    batch = micro_batch()
    before = made.micro_batch_loss(made.model, batch)
    assert torch.equal(made.micro_batch_loss(made.model, batch), before)
    weight = made.average.tensors()["projector.3.weight"]
    kept = weight.clone()
    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    changed = made.micro_batch_loss(made.model, batch)
    assert abs((changed - before).item()) > 0.05
    weight.copy_(kept)
    # The predictor is the student's alone.
    made.average.tensors()["predictor.3.weight"].zero_()
    assert torch.equal(made.micro_batch_loss(made.model, batch), before)


def test_a_dead_average_is_noticed_and_a_standing_one_changes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, standing = build(tmp_path), build(tmp_path)
    moving.train()
    standing.update_average = lambda: None
    standing.train()
    apart = [tiny.difference(a, b) for a, b in zip(moving.recorder.weights, standing.recorder.weights, strict=True)]
    assert apart[0] == 0 and min(apart[1:]) > 1e-5 and apart[-1] > 1e-3
    monkeypatch.setattr(WeightAverage, "blend", lambda self, *_, **__: None)
    with pytest.raises(DeadTeacherError):
        build(tmp_path).train()


def test_the_target_is_in_eval_mode_with_the_averaged_statistics(tmp_path: Path) -> None:
    made = trained(tmp_path)
    state = made.target().module.state_dict()
    assert tiny.same_bits(dict(state), {name: made.average.tensors()[name] for name in state})
    student = dict(made.model.named_buffers())["encoder.1.running_mean"]
    assert not torch.equal(state["encoder.1.running_mean"], student)
    pixels = micro_batch()["inputs"]["pixel_values"]
    alone, together = (made.target()(pixel_values=rows).projections[0] for rows in (pixels[:1], pixels))
    torch.testing.assert_close(alone, together)


# ---- Kappa


def gradients(folder: Path, kappa: int) -> list[tiny.Tensors]:
    """At fixed weights and a fixed average."""
    made = build(folder, kappa=float(kappa), small_batch_until=0, learning_rate=0.0)
    made.update_average = lambda: None
    made.train()
    found: list[tiny.Tensors] = made.recorder.gradients
    return found


def test_the_gradient_of_a_kappa_step_is_the_mean_of_its_reference_steps(tmp_path: Path) -> None:
    single = gradients(tmp_path, 1)
    for kappa in (2, 8):
        steps = gradients(tmp_path, kappa)
        assert len(steps) == 8 // kappa
        for number, step in enumerate(steps):
            expected = tiny.mean(single[number * kappa : (number + 1) * kappa])
            assert tiny.difference(expected, step) < 1e-5
    assert tiny.difference(single[0], single[1]) > 0.1


class Seen(RandomViews):
    """Views, and what they were made of and became, by seed."""

    def __call__(self, images: Tensor, seeds: Any) -> Tensor:
        made = super().__call__(images, seeds)
        record = self.__dict__.setdefault("record", {})
        record.update({seed: (a.clone(), b) for seed, a, b in zip(seeds, images, made, strict=True)})
        return made


def views_of(folder: Path, **changes: Any) -> dict[int, Any]:
    views = Seen(**vars(VIEWS))
    trained(folder, views=views, **changes)
    record: dict[int, Any] = views.__dict__["record"]
    return record


def test_views_are_the_same_at_every_kappa_and_others_with_another_seed(tmp_path: Path) -> None:
    plain = views_of(tmp_path)
    assert len(plain) == 8 * 4 * 2
    assert tiny.same_bits(plain, views_of(tmp_path, kappa=4.0, small_batch_until=2))
    assert tiny.same_bits(plain, views_of(tmp_path, kappa=8.0, per_device_train_batch_size=2, small_batch_until=0))
    first = min(plain)
    assert sorted(plain) == list(range(first, first + 64)) and first == 2 * 42 * 2**40
    pairs = [(plain[first + 2 * place], plain[first + 2 * place + 1]) for place in range(32)]
    assert all(torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) for a, b in pairs)
    other = views_of(tmp_path, seed=1, data_seed=42)
    same_order = views_of(tmp_path, seed=0, data_seed=42)
    assert other.keys().isdisjoint(same_order)
    assert tiny.same_bits([a for a, _ in other.values()], [a for a, _ in same_order.values()])
    assert not tiny.same_bits([b for _, b in other.values()], [b for _, b in same_order.values()])


def test_resuming_changes_no_bit(tmp_path: Path) -> None:
    values = {
        "kappa": 2.0,
        "small_batch_until": 3,
        "ema_momentum_schedule": "cosine",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trained(tmp_path / "whole", **values)
    resumed = build(tmp_path / "resumed", model=network(7), **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for a, b in ((whole.model.state_dict(), resumed.model.state_dict()), (tiny.average(whole), tiny.average(resumed))):
        assert tiny.same_bits(dict(a), dict(b))
    assert tiny.same_bits(whole.recorder.gradients[3:], resumed.recorder.gradients)


# ---- Labels and the probe


def test_labels_change_no_weight(tmp_path: Path) -> None:
    labelled = images(19, labels=True)
    shuffled = ImageRows(labelled.read, 19, labelled.labels[::-1])
    results = [
        (tiny.average(made), tiny.parameters(made.model))
        for made in (
            trained(tmp_path, train=data, probe_dataset=data, eval_dataset=data, eval_strategy="steps", eval_steps=4)
            for data in (labelled, shuffled)
        )
    ]
    results.append((tiny.average(made := trained(tmp_path)), tiny.parameters(made.model)))
    assert tiny.same_bits(results[0], results[1]) and tiny.same_bits(results[0], results[2])


def test_both_weight_sets_are_probed(tmp_path: Path) -> None:
    probe, evaluation = images(60, 1, labels=True), images(300, 2, labels=True)
    made = trained(
        tmp_path, probe_dataset=probe, eval_dataset=evaluation, learning_rate=0.3, per_device_eval_batch_size=70
    )
    scores = made.evaluate()
    made.save_model(str(tmp_path / "final"))
    found = []
    for folder, prefix in (("final", "eval_"), ("final/ema", "eval_ema_")):
        model = BYOLModel.from_pretrained(tmp_path / folder).eval()
        features = []
        for rows in (probe, evaluation):
            pixels = torch.stack([row["pixel_values"] for row in rows])
            with torch.no_grad():
                features.append(model.encoder(2 * pixels - 1))
        expected = probe_accuracy(
            features[0], torch.tensor(probe.labels), features[1], torch.tensor(evaluation.labels)
        )
        assert scores[f"{prefix}probe_accuracy"] == pytest.approx(expected, abs=1e-9)
        found.append((expected, scores[f"{prefix}loss"]))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    whole = build(tmp_path, model=made.model, eval_dataset=evaluation, per_device_eval_batch_size=300)
    whole.average = made.average
    for key in ("eval_loss", "eval_ema_loss"):
        assert whole.evaluate()[key] == pytest.approx(scores[key], rel=1e-5)


# ---- Model


@pytest.mark.parametrize(
    "backbone",
    [
        None,
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"),
        ViTConfig(
            num_channels=1,
            image_size=6,
            patch_size=3,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        ),
    ],
    ids=["small", "resnet", "vit"],
)
def test_a_model_comes_back_as_it_was_saved_and_teaches(tmp_path: Path, backbone: Any) -> None:
    torch.manual_seed(0)
    config = BYOLConfig(backbone, num_channels=1, encoder_channels=[3, 4], hidden_size=6, projection_size=5)
    model = BYOLModel(config).eval()
    pixels = torch.rand(3, 2, 1, 6, 6)
    outputs = model(pixels)
    assert outputs.logits.shape == (3, 2, 5) and outputs.features.shape[:2] == (3, 2)
    torch.testing.assert_close(outputs.projections[:, 1], model(pixels[:, 1]).projections)
    model.save_pretrained(tmp_path)
    loaded = BYOLModel.from_pretrained(tmp_path)
    assert tiny.same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    teacher = EMATeacher(model, WeightAverage(model))
    torch.testing.assert_close(teacher(pixel_values=pixels).projections, outputs.projections)


def test_each_view_is_normalised_by_its_own_statistics() -> None:
    model = network().train()
    dark, bright = torch.rand(4, 1, 6, 6) * 0.2, torch.rand(4, 1, 6, 6) * 0.2 + 0.8
    apart = [model(view).features for view in (dark, bright)]
    torch.testing.assert_close(model(torch.stack([dark, bright], 1)).features, torch.stack(apart, 1))


def test_single_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 0 has a micro-batch of one row.*per_device_train_batch_size=1"):
        build(tmp_path, per_device_train_batch_size=1)
    # Steps of 5 straddle reference batches of 4: the first has one row of the second.
    with pytest.raises(ValueError, match="step 0 has a micro-batch of one row"):
        build(tmp_path, batch_size=5)
    with pytest.raises(ValueError, match="step 4 has a micro-batch of one row"):
        build(tmp_path, batch_schedule='[{"batch_size": 4, "until": 4}, {"batch_size": 5}]')
