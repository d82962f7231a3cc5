"""What a run is made of: one frozen record, written to config.json, enough to run it again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# method -> name of its class in `pae.prompts`
FAMILIES = {
    "vpt-deep": "VPTDeep",
    "vpt-shallow": "VPTShallow",
    "bpt": "BPTDeep",
    "bpt-shallow": "BPTShallow",
    "vapt": "VAPT",
    "ivpt": "IVPT",
    "vfpt": "VFPTDeep",
    "vfpt-shallow": "VFPTShallow",
    "pro-vpt": "ProVPT",
    "e2vpt": "E2VPT",
    "da-vpt": "DAVPT",
    "lspt": "LSPT",
    "apt": "APT",
}
METHODS = ("linear", "full", *FAMILIES)
SPT_METHODS = ("random", "mean_pooling", "max_pooling", "kmeans")
ENGINES = ("fast", "reference")
SCHEDULERS = ("cosine", "step", "poly", "none")
AMPS = ("auto", "bf16", "fp16", "no")
DEVICES = ("auto", "cpu", "cuda")

# what None means, per method; found on validation images only, never on test images
_RECIPES = {
    "linear": {
        "epochs": 50,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 1e-2,
        "warmup_epochs": 0.0,
    },
    "full": {
        "epochs": 10,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": 3e-5,
        "weight_decay": 0.05,
        "warmup_epochs": 1.0,
    },
    "prompts": {
        "epochs": 10,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 1e-2,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.5,
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run.

    Attributes:
        dataset: name of an embedded image set, or None when `data` is given.
        data: dataset folder, or None.
        train_size, val_size: stratified cut of the training pool; None for the dataset's own.
        model: "dinov2-s14-derived" (embedded) or any timm model name.
        weights: local file with pretrained weights for a timm model, or None.
        pretrained: load pretrained weights at all.
        img_size: image side in pixels; None for the model's own.
        norm, augment: see `pae.train.pixels`.
        method: one of `METHODS`.
        engine: "fast" (`pae.fast_forward`) or "reference"; the curves agree.
        num_tokens, dropout: prompts per block, and prompt dropout.
        family: further arguments of the method's prompt family, by name.
        head_init: "default" (the layer's own) or "vpt" (Kaiming fan-out, bias -log 99).
        spt: start from tokens of training images (`pae.spt_init`), one of `SPT_METHODS`, or None.
        kld, kld_*: the Koopman-Lyapunov regulariser and its options.
        mpa, mpa_*: Modal Pre-Alignment before training and its options; `mpa_images` is the number
            of training images it looks at; None for 8 on a CPU, 64 on a GPU.
        epochs, batch_size, optimizer, lr, weight_decay, scheduler, warmup_epochs: the recipe; None
            for the method's own. `batch_size` counts images over all processes.
        amp: "bf16", "fp16", "no", or "auto" (bf16 where the hardware has it).
        device: "cpu", "cuda" or "auto".
        seed: of the data cut, the initialisation, the order and the dropout.
        save_every_steps: steps between saved states inside an epoch; 0 saves at epoch ends only.
    """

    dataset: str | None = "pneumonia"
    data: str | None = None
    train_size: int | None = None
    val_size: int | None = None
    model: str = "dinov2-s14-derived"
    weights: str | None = None
    pretrained: bool = True
    img_size: int | None = None
    norm: str = "model"
    augment: str = "none"
    method: str = "vpt-deep"
    engine: str = "fast"
    num_tokens: int = 10
    dropout: float = 0.0
    family: dict = dataclasses.field(default_factory=dict)
    head_init: str = "default"
    spt: str | None = None
    kld: bool = False
    kld_dim: int = 256
    kld_mode: str = "global"
    kld_formulation: str = "code"
    kld_consistency: float = 0.5
    kld_lyapunov: float = 0.2
    kld_gauge: str = "none"
    mpa: bool = False
    mpa_images: int | None = None
    mpa_window: int = 16
    mpa_stride: int = 8
    mpa_head: str = "as_is"
    mpa_search: str = "exact"
    mpa_precision: str = "exact"
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    scheduler: str = "cosine"
    warmup_epochs: float | None = None
    amp: str = "auto"
    device: str = "auto"
    seed: int = 0
    workers: int | None = None
    save_every_steps: int = 0

    def resolved(self) -> Settings:
        """A copy in which every None of the recipe and every "auto" is the value it stands for.

        Raises:
            ValueError: an option that is out of range, unknown, or contradicts another.
        """
        self.check()
        values = {k: v for k, v in _recipe(self.method).items() if getattr(self, k) is None}
        if "warmup_epochs" in values:
            epochs = self.epochs if self.epochs is not None else values["epochs"]
            values["warmup_epochs"] = min(values["warmup_epochs"], epochs / 4)
        device = _resolve_device(self.device)
        values.update(device=device, amp=_resolve_amp(self.amp, device))
        if self.mpa_images is None:
            values["mpa_images"] = 64 if device == "cuda" else 8
        if self.workers is None:
            from pae.train.pixels import default_workers

            values["workers"] = default_workers()
        return dataclasses.replace(self, **values)

    def check(self) -> None:
        """Raises ValueError for the first option that cannot be."""
        for name, allowed in (
            ("method", METHODS),
            ("engine", ENGINES),
            ("scheduler", SCHEDULERS),
            ("amp", AMPS),
            ("device", DEVICES),
            ("head_init", ("default", "vpt")),
        ):
            if getattr(self, name) not in allowed:
                _refuse(name, getattr(self, name), f"one of {', '.join(allowed)}")
        for name, low in (
            ("num_tokens", 0),
            ("epochs", 1),
            ("batch_size", 1),
            ("mpa_images", 1),
            ("save_every_steps", 0),
            ("workers", 0),
            ("seed", 0),
            ("weight_decay", 0),
            ("warmup_epochs", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                _refuse(name, value, f"at least {low}")
        if self.lr is not None and not self.lr > 0:
            _refuse("lr", self.lr, "a positive number")
        if not 0 <= self.dropout < 1:
            _refuse("dropout", self.dropout, "a number in [0, 1)")
        if self.data is not None and self.dataset is not None:
            raise ValueError("--data and --dataset exclude each other")
        if self.method == "full" and self.head_init == "vpt":
            raise ValueError("--head-init vpt is for linear and for methods with prompts")
        prompted = self.method in FAMILIES
        for name in ("kld", "mpa", "spt", "family"):
            if getattr(self, name) and not prompted:
                option = "option" if name == "family" else name
                raise ValueError(f"--{option} needs a --method with prompts")
        if self.mpa and self.spt:
            raise ValueError("--mpa and --spt exclude each other: both set the first prompts")
        if self.spt is not None and self.spt not in SPT_METHODS:
            _refuse("spt", self.spt, f"one of {', '.join(SPT_METHODS)}")
        if self.kld and self.method.endswith("-shallow"):
            raise ValueError(
                f"--kld couples the prompts of successive blocks, and {self.method} has some in "
                "block 0 alone"
            )
        if (self.kld or self.mpa) and self.num_tokens == 0:
            raise ValueError("--kld and --mpa need --num-tokens of at least 1")


def _recipe(method):
    return _RECIPES["prompts" if method in FAMILIES else method]


def _refuse(name, value, expected):
    raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def _resolve_device(device):
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no usable GPU here")
    return device


def _resolve_amp(amp, device):
    """bf16 pays only where the hardware multiplies it; elsewhere it is emulated and slower."""
    import torch

    if amp == "fp16" and device == "cpu":
        raise ValueError("--amp fp16: a GPU is needed; use bf16 or no on the CPU")
    if amp != "auto":
        return amp
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16")) else "no"
