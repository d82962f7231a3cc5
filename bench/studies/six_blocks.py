"""The backbone of convergence.toml and families.toml: the embedded one cut to its first blocks.

    python -m bench.studies.six_blocks runs/six-blocks

The folder is one that timm reads, `--model local-dir:runs/six-blocks`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from pae.train import embedded

from .runs import write_json

DEPTH, SIZE = 6, 56  # blocks, and pixels of an image's side


def cut(folder: Path) -> None:
    """Writes config.json and model.safetensors."""
    whole = embedded.load_backbone(SIZE)
    kept = {
        name: tensor.contiguous()
        for name, tensor in whole.state_dict().items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < DEPTH
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    names = ("mean", "std", "interpolation", "num_classes", "first_conv", "classifier")
    about = {
        "architecture": embedded.WEIGHTS_ARCHITECTURE,
        "model_args": {"depth": DEPTH, "img_size": SIZE},
        "pretrained_cfg": {name: whole.pretrained_cfg[name] for name in names},
    }
    write_json(folder / "config.json", about)


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
