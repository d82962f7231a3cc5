"""A head fitted in closed form to frozen features, to rank windows with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGES = tuple(10.0**k for k in range(-4, 3))
SCALES = tuple(2.0**k for k in range(7))


@torch.no_grad()
def fit_probe(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """s (W f + b) with (W, b) = argmin sum |W f + b - onehot(y)|^2 + ridge |W|^2, in closed form.

    `ridge` (relative to the mean eigenvalue of the centred Gram matrix) and the scale s are the
    pair of `RIDGES` x `SCALES` with the smallest leave-one-out cross-entropy, which has a closed
    form as well: an image's held-out prediction is (fit - h y) / (1 - h), h its leverage.

    Args:
        features: (B, F), B >= 2.
        labels: (B,) int64 in [0, classes).

    Returns:
        a linear layer in the dtype of `features`; computed in fp64.
    """
    x, y = features.double(), F.one_hot(labels, classes).double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    x = x - mean_x
    eigenvalues, basis = torch.linalg.eigh(x @ x.T)
    eigenvalues = eigenvalues.clamp_min(0)
    unit = eigenvalues.mean().clamp_min(1e-30)  # all features equal: W = 0 rather than 0 / 0

    best = (float("inf"), RIDGES[0], SCALES[0])
    for ridge in RIDGES:
        shrink = eigenvalues / (eigenvalues + ridge * unit)
        hat = (basis * shrink) @ basis.T + 1 / len(x)  # the intercept's share is 1 / B
        leverage = hat.diagonal()[:, None]
        held_out = (hat @ y - leverage * y) / (1 - leverage)
        for scale in SCALES:
            best = min(best, (F.cross_entropy(scale * held_out, labels).item(), ridge, scale))

    _, ridge, scale = best
    dual = (basis / (eigenvalues + ridge * unit)) @ (basis.T @ (y - mean_y))
    probe = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=x.device, dtype=x.dtype)
    probe.weight.copy_(scale * dual.T @ x)
    probe.bias.copy_(scale * mean_y - probe.weight @ mean_x)
    return probe.to(features.dtype)
