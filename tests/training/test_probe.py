"""The linear probe by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ema_scaling.training.probe import probe_accuracy


def test_ridge_regression_by_hand() -> None:
    """Against the augmented least-squares problem [X; sqrt(n ridge) I] W = [Y; 0], solved by numpy."""
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 3, 40), rng.integers(0, 3, 200)
    centres = rng.standard_normal((3, 4))
    train, test = (
        centres[y] + 1.2 * rng.standard_normal((len(y), 4)) * [1, 10, 0.1, 5] for y in (labels, test_labels)
    )
    for ridge in (1e-3, 0.5, 20.0):
        x, z = ((rows - train.mean(0)) / train.std(0) for rows in (train, test))
        y = np.eye(3)[labels]
        padded = np.vstack([x, np.sqrt(40 * ridge) * np.eye(4)])
        weights, *_ = np.linalg.lstsq(padded, np.vstack([y - y.mean(0), np.zeros((4, 3))]), rcond=None)
        expected = float(((z @ weights + y.mean(0)).argmax(1) == test_labels).mean())
        given = (torch.tensor(a) for a in (train, labels, test, test_labels))
        assert probe_accuracy(*given, ridge=ridge) == pytest.approx(expected, abs=1e-12)
        assert expected > 0.4


def test_units_of_features_and_constant_features_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    features = torch.randn(60, 5, generator=generator) + labels[:, None] * torch.tensor([1.0, 0, 0.5, 0, 0])
    accuracy = probe_accuracy(features[:30], labels[:30], features[30:], labels[30:])
    assert 0.3 < accuracy < 1
    other = torch.cat([features * torch.tensor([1e3, 1, 1e-3, 7, 1]) + 5, torch.full((60, 1), 3.0)], 1)
    assert probe_accuracy(other[:30], labels[:30], other[30:], labels[30:]) == accuracy


def test_collapsed_features_predict_the_most_frequent_class() -> None:
    labels = torch.tensor([1, 1, 1, 0, 2])
    assert probe_accuracy(torch.ones(5, 3), labels, torch.ones(5, 3), labels) == pytest.approx(3 / 5)
