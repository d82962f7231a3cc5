"""What is trained: the backbone, and on it a linear probe, all weights, or prompts.

The three share one face, so that the loop does not ask which it has: ``forward(x, engine)``,
``parameter_groups``, ``penalty``, ``trained_state``, ``save``, ``load``.
"""

from __future__ import annotations

import difflib
import inspect
import json

import torch
from torch import nn

import pae
from pae.checkpoint import write_atomically
from pae.train import embedded
from pae.train.settings import FAMILIES


def build_backbone(settings, num_classes):
    """The pretrained backbone with a fresh head of `num_classes`.

    Args:
        settings: a `Settings`.
        num_classes: outputs of the head.
    Returns:
        A timm model.
    Raises:
        ValueError: unknown model, impossible image size, weights that cannot be loaded.
        FetchError: the embedded weights cannot be had.
    """
    import timm

    if settings.model == embedded.WEIGHTS_NAME:
        if settings.weights is not None or not settings.pretrained:
            raise ValueError(
                f"--model {settings.model} brings its own weights; for others give the timm name "
                f"{embedded.WEIGHTS_ARCHITECTURE}"
            )
        return embedded.load_backbone(settings.img_size or embedded.WEIGHTS_IMAGE_SIZE, num_classes)
    if not timm.is_model(settings.model):
        near = difflib.get_close_matches(
            settings.model, [embedded.WEIGHTS_NAME, *timm.list_models()]
        )
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"--model {settings.model}: timm has no such model{hint}")
    options = {"num_classes": num_classes}
    if settings.img_size is not None:
        options["img_size"] = settings.img_size
    if settings.weights is not None:
        options["pretrained_cfg_overlay"] = {"file": settings.weights}
    try:
        return timm.create_model(settings.model, pretrained=settings.pretrained, **options)
    # timm and the hub raise whatever their parts raise; the user needs one line and a way out
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if not settings.pretrained:
            raise ValueError(f"--model {settings.model}: {reason[0]}") from error
        raise ValueError(
            f"--model {settings.model}: pretrained weights could not be loaded ({reason[0]}); "
            "give a file with --weights, or --no-pretrained"
        ) from error


def build_method(settings, num_classes):
    """The module that `settings.method` trains, on a fresh backbone.

    Raises:
        ValueError: as `build_backbone`; `UnsupportedBackbone` for a backbone pae cannot read.
    """
    backbone = build_backbone(settings, num_classes)
    if settings.method == "full":
        return FullFineTuning(backbone)
    new_head = num_classes if settings.head_init == "vpt" else None  # None keeps the default one
    if settings.method == "linear":
        return LinearProbe(pae.PromptedViT(backbone, pae.prompts.VPTDeep(0), None, new_head))
    kld = None
    if settings.kld:
        kld = pae.KLD(
            dim=settings.kld_dim,
            mode=settings.kld_mode,
            consistency_weight=settings.kld_consistency,
            lyapunov_weight=settings.kld_lyapunov,
            formulation=settings.kld_formulation,
            gauge=settings.kld_gauge,
        )
    return pae.PromptedViT(backbone, build_prompts(settings, num_classes), kld, new_head)


def build_prompts(settings, num_classes):
    """The prompt family that `settings.method` names, with the arguments in `settings.family`.

    Raises:
        ValueError: an argument the family does not have, or one that it refuses.
    """
    family = getattr(pae.prompts, FAMILIES[settings.method])
    known = inspect.signature(family).parameters
    given = {"num_tokens": settings.num_tokens, "dropout": settings.dropout}
    if "num_classes" in known:
        given["num_classes"] = num_classes
    if "num_proxies" in known:
        given["num_proxies"] = settings.num_tokens
    if "dropout" not in known and settings.dropout == 0:
        del given["dropout"]
    arguments = {**given, **settings.family}
    for name in arguments:
        if name not in known:
            option = f"--{name}" if name in given else f"--option {name}"
            raise ValueError(f"{option}: {settings.method} has {', '.join(known)}")
    try:
        return family(**arguments)
    except TypeError as error:
        raise ValueError(f"--method {settings.method}: {error}") from error


class LinearProbe(nn.Module):
    """A head on frozen features: the features are computed once, `forward` takes them.

    Args:
        frozen: a `PromptedViT` without prompts; its head is the one trained.
    """

    def __init__(self, frozen):
        super().__init__()
        self.head = frozen.head
        # a plain attribute would register the backbone as a part of what is trained and wrapped
        self._frozen = [frozen]

    @property
    def frozen(self):
        """The `PromptedViT` whose features are read."""
        return self._frozen[0]

    def features(self, images):
        """(B, C, H, W) -> (B, F), what the head sees."""
        view = self.frozen.view
        x = view.embed(images)
        for block in view.blocks:
            x = block(x)
        return view.readout(x)

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        self.frozen._apply(function, recurse)
        return self

    def forward(self, features, engine="fast"):
        """Logits (B, classes) of features (B, F); there is nothing for an engine to do."""
        return self.head(features)

    def penalty(self):
        """Nothing is regularised beyond weight decay."""
        return torch.zeros((), device=self.head.weight.device)

    def parameter_groups(self, lr, weight_decay):
        """The head's groups of `PromptedViT.parameter_groups`."""
        groups = self.frozen.parameter_groups(lr, weight_decay)
        return [group for group in groups if group["name"] in ("head", "head_bias")]

    def trained_state(self):
        """The head, by name."""
        return self.state_dict()

    def save(self, path):
        """As `PromptedViT.save`: the file is a checkpoint of a model without prompts."""
        self.frozen.save(path)

    def load(self, path):
        """As `PromptedViT.load`."""
        self.frozen.load(path)


class FullFineTuning(nn.Module):
    """All weights of a timm model, the baseline that prompts are compared with."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.requires_grad_(True)

    def forward(self, images, engine="fast"):
        """Logits (B, classes); both engines are timm's own forward, for no weight is frozen."""
        return self.backbone(images)

    def penalty(self):
        """Nothing is regularised beyond weight decay."""
        return torch.zeros((), device=next(self.parameters()).device)

    def parameter_groups(self, lr, weight_decay):
        """Two groups: matrices are decayed; biases, norms and embeddings are not (timm's rule)."""
        from timm.optim import param_groups_weight_decay

        skip = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        groups = param_groups_weight_decay(self.backbone, weight_decay, skip)
        return [{**group, "lr": lr} for group in groups]

    def trained_state(self):
        """Every weight, by name."""
        return self.state_dict()

    def save(self, path):
        """Writes the timm state dict as safetensors, atomically."""
        from safetensors.torch import save_file

        state = {name: tensor.contiguous() for name, tensor in self.backbone.state_dict().items()}
        name = pae.checkpoint.backbone_name(self.backbone)
        metadata = {"pae": json.dumps({"format": "timm-state-dict", "backbone": name})}
        write_atomically(path, lambda file: save_file(state, file, metadata=metadata))

    def load(self, path):
        """Reads what `save` wrote.

        Raises:
            CheckpointError: unreadable file, or weights of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.backbone.load_state_dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise pae.CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        except RuntimeError as error:
            raise pae.CheckpointError(f"checkpoint {path} does not fit this model") from error


def load_trained_state(module, state):
    """Puts the tensors of `module.trained_state()` back, exactly those and no others.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    expected = module.trained_state()
    for name in sorted(expected.keys() | state.keys()):
        here, there = expected.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise pae.CheckpointError(f"the saved state does not fit this model at {name}")
    module.load_state_dict(state, strict=False)  # a frozen backbone is no part of `state`


def trained_parameters(module):
    """Number of parameters that the optimiser sees."""
    groups = module.parameter_groups(1.0, 0.0)
    return sum(p.numel() for group in groups for p in group["params"])
