"""Shared fixtures: golden vectors, the tiny backbone they belong to, and a reproducible start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

GOLDEN = Path(__file__).parent / "golden"

# tiny tensors: a second thread only waits for the first, and badly when the machine is shared
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def poisoned_memory():
    """Every tensor from torch.empty starts as NaN, so that an entry nobody writes cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """golden("vpt_deep") -> the arrays of that file; see tests/golden/README.md."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture
def tiny_vit(golden) -> Callable[..., VisionTransformer]:
    """tiny_vit(dtype) -> timm model with the frozen weights that the golden vectors belong to."""

    def build(dtype: torch.dtype = torch.float32) -> VisionTransformer:
        vit = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_classes=10,
        )
        weights = golden("backbone")
        names = [key for key in weights if key.startswith("timm/")]
        vit.load_state_dict({n.removeprefix("timm/"): torch.from_numpy(weights[n]) for n in names})
        return vit.to(dtype)

    return build
