"""The linear probe: how well a linear classifier on frozen features tells the classes apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Weight of the ridge penalty for each training row, in units of a standardised feature's variance.
RIDGE = 1e-3


def probe_accuracy(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *, ridge: float = RIDGE
) -> float:
    """Accuracy of ridge regression from features to one-hot labels, solved in closed form in float64.

    With standardised features X `(n, d)` (constant features are left out), centred one-hot labels Y:
    `W = (X'X + n * ridge * I)^-1 X'Y`; a row's class is the largest of `x W + mean(Y)`. Nothing is drawn or iterated.

    Args:
        train_features: `(n, d)`, any float dtype.
        train_labels: int64 `(n,)`.
        features: `(m, d)`.
        labels: int64 `(m,)`.
        ridge: penalty per training row.
    """
    known = train_features.double()
    mean, std = known.mean(0), known.std(0, correction=0)
    varying = std > 1e-12 * std.max()

    def standardised(values: Tensor) -> Tensor:
        return ((values.double() - mean) / std)[:, varying]

    x = standardised(train_features)
    y = F.one_hot(train_labels).double()
    gram = x.T @ x + len(x) * ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    predicted = (standardised(features) @ weights + y.mean(0)).argmax(-1)
    return float((predicted == labels).double().mean())
