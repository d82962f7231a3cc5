"""What is trained: the backbone, and on it a linear probe, all weights, or prompts.

The three share one face, so that the loop can step, save and go on with any of them alike:
``forward(x, engine)``, ``parameter_groups``, ``penalty``, ``trained_state``, ``save``, ``load``. It
asks which one it has where only one has an answer: a probe trains on features, prompts have hooks.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

import pae
from pae.backbones import BackboneView, named, read_backbone, trained
from pae.backbones.weights import has_norm_of_a_mean
from pae.files import to_json
from pae.foreign import first_line
from pae.mpa.incoming import prompt_count, refuse_clips
from pae.tensorfile import fitted, read_tensors, require_digest, write_tensors
from pae.train import embedded, hf_data, pixels
from pae.train.declared import Given, declared, fits, name_of, near
from pae.train.options import LOCAL, OWN_POOL, Options

Method: TypeAlias = "LinearProbe | FullFineTuning | pae.PromptedViT | pae.PromptedSegmenter"
Weights: TypeAlias = "str | Path | Mapping[str, Tensor]"


def build_backbone(
    options: Options,
    num_classes: int,
    skeleton: bool = False,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """The pretrained backbone with a fresh head of `num_classes`, its readout as `pool` says.

    Args:
        options: resolved.
        num_classes: outputs of the head.
        skeleton: on the meta device: its sizes without its weights, in no time. Of a file of
            weights names and shapes are checked, and nothing else is read.
        say: told in one line from where in a file the weights were taken.
    Returns:
        A timm model, or what `pae.backbones.named` loads; without a head where there is no place
        for one.
    Raises:
        ValueError: unknown model, impossible image size, weights that cannot be had; a `pool` that
            its readout cannot be given; options of timm's models with another.
        CheckpointError: a file of weights is unreadable, or does not fit the model.
        FetchError: the embedded weights cannot be had.
    """
    if named.is_named(options.model):
        return _named_backbone(options, num_classes, skeleton, say)
    model, weights = _backbone_as_published(options, num_classes, skeleton)
    # what takes a mean or a maximum already stays as it is
    changes = options.pool != OWN_POOL and getattr(model, "global_pool", "") not in _MEANS
    # of a model that was fine-tuned with a mean the file has the norm behind it
    of_file = changes and weights is not None and has_norm_of_a_mean(weights)
    if not of_file:
        _load(model, options, weights, skeleton, say)
    if not changes:
        return model
    try:
        pae.backbones.average_pooled(model)
    except pae.UnsupportedBackbone as error:
        raise ValueError(f"--pool {options.pool}: {error}") from error
    if of_file:
        _load(model, options, weights, skeleton, say)
    if say is not None and not skeleton:
        whose = "the file's norm" if of_file else "a new norm"
        say(f"readout: the class token's is replaced by a mean of rows and {whose}")
    return model


def _named_backbone(
    options: Options, num_classes: int, skeleton: bool, say: Callable[[str], None] | None
) -> nn.Module:
    """A model of another library, with a fresh head in the place of its own."""
    model: Any = named.load_named(
        options.model,
        pretrained=options.pretrained,
        image_size=options.img_size,
        skeleton=skeleton,
        say=say,
        weights=options.weights,
        drop_path=options.drop_path,
        backbone_dropout=options.backbone_dropout,
    )
    place = pae.backbones.head_name(model)
    if place is not None:
        head = model.get_submodule(place)
        width = getattr(head, "in_features", None) or read_backbone(model).feature_width
        with torch.device("meta") if skeleton else contextlib.nullcontext():
            model.set_submodule(place, nn.Linear(width, num_classes))
    return model


_MEANS = ("avg", "avgmax", "max")  # of timm's readouts, those that pool rows


def recipe(options: Options) -> dict[str, Any]:
    """What of the options builds the backbone again; random weights by the seed that drew them."""
    found: dict[str, Any] = {"model": options.model}
    if options.weights is not None:
        found["weights"] = options.weights
    if not options.pretrained:
        found |= {"pretrained": False, "seed": options.seed}
    for name in ("img_size", "pool"):
        value = getattr(options, name)
        if value != declared(Options)[name].default:
            found[name] = value
    return found


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a checkpoint has it, which travels: files without the folders they lay in."""
    found = dict(recipe)
    local = LOCAL.fullmatch(found["model"])
    if local and (local[1] != "hf:" or Path(local[2]).is_absolute()):
        found["model"] = local[1] + Path(local[2]).name
    if found.get("weights") is not None:
        found["weights"] = Path(found["weights"]).name
    return found


def data_config(backbone: nn.Module) -> dict[str, Any]:
    """timm's: normalisation, interpolation, crop, and the (height, width) of the images."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=backbone)
    said = getattr(backbone, "pretrained_cfg", None)
    if isinstance(said, dict) and "input_size" in said and "mean" not in said:
        config |= {"mean": None, "std": None}  # of another library, and timm would guess
    # a vision transformer knows the size it was built for; its configuration the original one
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return {**config, "input_size": tuple(size or config["input_size"][1:])}


def _load(
    model: nn.Module,
    options: Options,
    weights: Weights | None,
    skeleton: bool,
    say: Callable[[str], None] | None,
) -> None:
    """The tensors of the backbone from a file, if there is one."""
    if weights is None:
        return
    name = options.model if isinstance(weights, Mapping) else None
    loaded = pae.backbones.load_weights(model, weights, name)
    if say is not None and not skeleton:
        say(str(loaded))


def _backbone_as_published(
    options: Options, num_classes: int, skeleton: bool
) -> tuple[nn.Module, Weights | None]:
    """The model, and the weights that it is still to be given."""
    import timm

    if options.model == embedded.WEIGHTS_NAME:
        if options.weights is not None or not options.pretrained:
            raise ValueError(
                f"--model {options.model} brings its own weights; for others give the timm name "
                f"{embedded.WEIGHTS_ARCHITECTURE}"
            )
        size = options.img_size or embedded.WEIGHTS_IMAGE_SIZE
        make = embedded.make_skeleton if skeleton else embedded.load_backbone
        return make(size, num_classes, **_drops(options)), None
    source, _, place = options.model.partition(":")
    if source not in _SOURCES and not timm.is_model(options.model):
        known = [embedded.WEIGHTS_NAME, *timm.list_models()]
        close = difflib.get_close_matches(options.model, known)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        hint = hint or "; hf:NAME is one of transformers, open_clip:NAME/TAG of open_clip"
        if "/" in options.model:
            hint = f"; hf-hub:{options.model} is on the hub, local-dir:{options.model} a folder"
        raise ValueError(f"--model {options.model}: timm has no such model{hint}")
    more: dict[str, Any] = {"num_classes": num_classes, **_drops(options)}
    if options.img_size is not None:
        more["img_size"] = options.img_size
    weights: Weights | None = options.weights
    # only what timm itself publishes under a name of its own is left to its loader, which is
    # silent about tensors that a file lacks
    pretrained = options.pretrained and not skeleton and weights is None and source not in _SOURCES
    try:
        with torch.device("meta") if skeleton else contextlib.nullcontext():
            model = timm.create_model(options.model, pretrained=pretrained, **more)
        if options.pretrained and weights is None and source in _SOURCES:
            if source == "local-dir":
                weights = _weights_in(Path(place))
            elif not skeleton:
                weights = timm.models.load_state_dict_from_hf(place)
    # timm and the hub raise whatever their parts raise; the user needs one line and a way out
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, KeyError) and source in _SOURCES:  # a folder of another library
            reason = f"its config.json is not timm's, it lacks {reason}"
        if not options.pretrained or options.weights is not None:
            raise ValueError(f"--model {options.model}: {reason}") from error
        raise ValueError(
            f"--model {options.model}: pretrained weights could not be loaded ({reason}); "
            "give a file with --weights, or --no-pretrained"
        ) from error
    return model, weights


def _drops(options: Options) -> dict[str, float]:
    """What the backbone drops in training, in timm's words."""
    rates = {
        "drop_path_rate": options.drop_path,
        "pos_drop_rate": options.backbone_dropout,
        "proj_drop_rate": options.backbone_dropout,
    }
    return {name: rate for name, rate in rates.items() if rate > 0}


def start_training(module: nn.Module, options: Options) -> None:
    """Training mode; of a backbone under prompts, which stays in eval mode, what drops at random.

    Args:
        module: a `Method`, or a wrapper around one.
        options: its own.
    """
    module.train()
    if options.has_prompts and _drops(options):
        for part in module.modules():
            # transformers has a class of its own in every file
            if isinstance(part, nn.Dropout) or type(part).__name__.endswith("DropPath"):
                part.train()


# where timm finds models besides its own names, "hf_hub" being its older spelling
_SOURCES = ("hf-hub", "hf_hub", "local-dir")


def _weights_in(folder: Path) -> Path:
    """The file that timm would take of a folder: under a known name, or the only one there is."""
    names = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        found = [path for end in ("safetensors", "pth", "bin") for path in folder.glob(f"*.{end}")]
        if len(found) != 1:
            raise ValueError(f"expected one file of weights in {folder}, got {len(found)}")
    return found[0]


def build_method(
    options: Options,
    num_classes: int,
    skeleton: bool = False,
    say: Callable[[str], None] | None = None,
) -> Method:
    """The module that `options.method` trains, on a fresh backbone; `skeleton`, `say` as there.

    Raises:
        ValueError, CheckpointError: as `build_backbone`.
        UnsupportedBackbone: pae cannot read the backbone.
    """
    backbone = build_backbone(options, num_classes, skeleton, say)
    if options.method == "full":
        return FullFineTuning(backbone, num_classes)
    # None keeps the default one, where there is a place for it
    has_place = pae.backbones.head_name(backbone) is not None
    new_head = num_classes if options.head_init == "vpt" or not has_place else None

    def with_head(model: pae.PromptedViT) -> pae.PromptedViT:
        if not has_place and options.head_init == "default":
            cast(nn.Linear, model.head).reset_parameters()
        return model

    if options.method == "linear":
        plain = pae.PromptedViT(backbone, pae.prompts.VPTDeep(0), None, new_head)
        return LinearProbe(with_head(plain))
    kld = None
    if options.kld:
        kld = pae.KLD(
            dim=options.kld_dim,
            mode=options.kld_mode,
            consistency_weight=options.kld_consistency,
            lyapunov_weight=options.kld_lyapunov,
            formulation=options.kld_formulation,
            gauge=options.kld_gauge,
        )
    pool = "image" if options.pool == OWN_POOL else options.pool
    more = [entry.strip() for entry in (options.train_backbone or "").split(",") if entry.strip()]
    prompts = build_prompts(options, num_classes)
    return with_head(pae.PromptedViT(backbone, prompts, kld, new_head, pool, more))


def build_prompts(
    options: Options, num_classes: int, given: Given | None = None
) -> pae.prompts.PromptFamily:
    """The prompt family that `options.method` names, with its `method_args`.

    Args:
        num_classes: of the data, for the families that want to know.
        given: who gave what, for the messages.
    Raises:
        ValueError: an argument that the family does not have, of another type, or that it refuses.
    """
    called = partial(options.called, given or Given())
    family = pae.prompts.METHODS[options.method]
    known = _arguments(family)
    own = arguments_of(options, family, called, ("num_tokens", "dropout", "num_classes"))
    arguments: dict[str, Any] = {}
    if "num_classes" in known:
        arguments["num_classes"] = num_classes
    if "num_proxies" in known:
        arguments["num_proxies"] = options.num_tokens
    arguments.update(own)
    missing = [
        name
        for name, parameter in inspect.signature(family).parameters.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise ValueError(
            f"{called('method')} needs {', '.join(missing)}: --method-args {missing[0]}=..."
        )
    return family(**arguments)


def arguments_of(
    options: Options, kind: type, called: Callable[[str], str], own: Sequence[str]
) -> dict[str, Any]:
    """Of a family or a pair: what `options` say of it, and its `method_args`.

    Args:
        called: an option's name in messages.
        own: arguments that `method_args` may not have: options, and what the data say.
    Raises:
        ValueError: an argument that there is not, or of another type.
    """
    known = _arguments(kind)
    for name, value in options.method_args.items():
        if name in own:
            where = "the number of classes of the images" if name == "num_classes" else f"--{name}"
            raise ValueError(f"{called('method_args')}: {name} is {where.replace('_', '-')}")
        if name not in known:
            free = [name for name in known if name not in own]
            raise ValueError(
                f"{called('method_args')}: {options.method} has no {name}; it has "
                f"{', '.join(free) or 'no arguments'}{near(name, free)}"
            )
        if not fits(value, known[name]):
            raise ValueError(
                f"{called('method_args')}: expected {name_of(known[name])} as {name}, got {value!r}"
            )
    arguments: dict[str, Any] = {"num_tokens": options.num_tokens}
    if "dropout" in known:
        arguments["dropout"] = options.dropout or 0.0
    elif options.dropout:
        raise ValueError(f"{called('dropout')}: {options.method} has no dropout")
    return arguments | options.method_args


def _arguments(family: type) -> dict[str, Any]:
    """{name: type} of what the constructor takes."""
    try:
        hints = typing.get_type_hints(family.__init__)  # type: ignore[misc]
    except NameError:  # of a family elsewhere, imported for type checkers alone
        hints = {}
    return {name: hints.get(name, Any) for name in inspect.signature(family).parameters}


# the images' classes are not counted yet: too many rather than too few, for DA-VPT gives up proxies
# where it has more of them than classes, and then KLD and MPA
_CLASSES = 1000


def rehearse(
    options: Options, given: Given | None = None, build: Callable[[], Any] | None = None
) -> None:
    """Build what the options name, without weights and without images, so that whatever refuses
    them speaks before anything is loaded or written.

    Args:
        options: resolved, of one run (no comparison).
        given: who gave what, for the messages.
        build: makes the module without weights; `build_method` of a thousand classes by default.
    Raises:
        ValueError: naming the option; `UnsupportedBackbone` for a backbone pae cannot read.
    """
    from timm.optim import create_optimizer_v2

    called = partial(options.called, given or Given())
    for name, exists, what in (("data", Path.is_dir, "folder"), ("weights", Path.is_file, "file")):
        path = getattr(options, name)
        if name == "data" and path is not None and hf_data.is_hf(path):
            continue  # who reads it says what is missing
        if path is not None and not exists(Path(path)):
            there = f"not a {what}" if Path(path).exists() else f"no such {what}"
            raise ValueError(f"{called(name)}: {there}")
    if options.data is None and named.frames_of(options.model) is not None:
        raise ValueError(
            f"{called('model')}: it reads clips, and {options.dataset or options.protocol} is "
            "one of images; give --data FOLDER with train/<class>/*.npy"
        )
    if options.method in pae.prompts.METHODS:
        with _named(options, called):
            build_prompts(options, _CLASSES, given)
    with _named(options, called):
        module = build() if build else build_method(options, _CLASSES, skeleton=True)
    try:
        create_optimizer_v2(
            module.parameter_groups(1.0, 0.0), opt=options.optimizer, lr=1.0, momentum=0.9
        )
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{called('optimizer')}: {error}") from error
    frozen = module.frozen if isinstance(module, LinearProbe) else module
    with _named(options, called):
        pixels.normalisation(options.norm, data_config(frozen.backbone))
    module = module.model if isinstance(module, pae.PromptedSegmenter) else module
    if not isinstance(module, pae.PromptedViT):
        return
    if options.ema is not None and module.prompts.moves_prompts:
        raise ValueError(
            f"{called('ema')}: {options.method} moves prompts between blocks, and an average would "
            "mix a prompt's values in one with those in another; leave it out"
        )
    for name in ("mpa", "spt"):
        if getattr(options, name):
            try:
                count = prompt_count(module)
            except ValueError as error:
                raise ValueError(f"{called(name)}: {error}") from error
    if options.mpa:
        _check_windows(options, called, module, count)


@contextlib.contextmanager
def _named(options: Options, called: Callable[[str], str]) -> Iterator[None]:
    """Puts the option in front of what a constructor says of its argument."""
    try:
        yield
    except pae.UnsupportedBackbone as error:
        raise type(error)(f"{called('model')}: {error}") from error
    except (TypeError, ValueError) as error:
        first = str(error).partition(" ")[0].partition("[")[0]
        if first in declared(Options):
            raise ValueError(f"{called(first)}: {error}") from error
        if first in options.method_args:
            raise ValueError(f"{called('method_args')}: {error}") from error
        if first in _arguments(pae.prompts.METHODS.get(options.method, object)):
            how = f"--method-args {first}=... sets it"
            raise ValueError(f"{called('method')}: {error}; {how}") from error
        raise


def _check_windows(
    options: Options, called: Callable[[str], str], module: pae.PromptedViT, count: int
) -> None:
    """Raise unless the images have as many windows as there are prompts."""
    try:
        refuse_clips(module)
    except ValueError as error:
        raise ValueError(f"{called('mpa')}: {error}") from error
    shape = module.view.shape
    side = min(cells * patch for cells, patch in zip(shape.grid, shape.patch_size, strict=True))
    window, stride = options.mpa_window, options.mpa_stride
    if window > side:
        raise ValueError(f"{called('mpa_window')}: expected at most {side}, the side of the images")
    windows = ((side - window) // stride + 1) ** 2
    if count > windows:
        raise ValueError(
            f"{called('num_tokens')}: {count} prompts, but {called('mpa_window')} and "
            f"{called('mpa_stride')} give {windows} windows in images of side {side}"
        )
    if options.mpa_head == "linear_probe" and options.mpa_images < 2:
        raise ValueError(
            f"{called('mpa_images')}: expected at least 2 for {called('mpa_head')}, which is "
            "judged on images that it was not fitted to"
        )


class LinearProbe(nn.Module):
    """A head on frozen features: the features are computed once, `forward` takes them.

    Args:
        frozen: a `PromptedViT` without prompts; its head is the one trained.
    """

    head: nn.Linear
    task: pae.TaskInfo | None = None

    def __init__(self, frozen: pae.PromptedViT) -> None:
        super().__init__()
        self.head = cast(nn.Linear, frozen.head)
        # a plain attribute would register the backbone as a part of what is trained and wrapped
        self._frozen = [frozen]

    @property
    def frozen(self) -> pae.PromptedViT:
        """The `PromptedViT` whose features are read."""
        return self._frozen[0]

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F), what the head sees."""
        return self.frozen.features(images)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearProbe:
        super()._apply(function, recurse)
        self.frozen._apply(function, recurse)
        return self

    def forward(self, features: Tensor, engine: str = "fast") -> Tensor:
        """Logits (B, classes) of features (B, F); there is nothing for an engine to do."""
        return self.head(features)

    def penalty(self) -> Tensor:
        """Nothing is regularised beyond weight decay."""
        return torch.zeros((), device=self.head.weight.device)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The head's groups of `PromptedViT.parameter_groups`."""
        groups = self.frozen.parameter_groups(lr, weight_decay)
        return [group for group in groups if group["name"] in ("head", "head_bias")]

    def trained_state(self) -> dict[str, Tensor]:
        """The head, by name."""
        return self.state_dict()

    def save(self, path: str | Path) -> None:
        """As `PromptedViT.save`: the file is a checkpoint of a model without prompts."""
        self.frozen.save(path, task=self.task)

    def load(self, path: str | Path) -> None:
        """As `PromptedViT.load`."""
        self.frozen.load(path)
        self.task = self.frozen.task


# formats of a whole model's file, of timm and of another library; how they begin: version 0.1 wrote
# no number behind
WHOLE, WHOLE_OF_OTHERS = "timm-state-dict-2", "library-state-dict-2"
WHOLE_FORMATS = ("timm-state-dict", "library-state-dict")
# in such a file, the head of a model without a place for one
NEW_HEAD = "new_head."
HEADS = ("head.weight", "classifier.weight", f"{NEW_HEAD}weight")


def is_former(format: str) -> bool:
    """Whether a whole model's file is from a version that wrote no digest."""
    return format not in (WHOLE, WHOLE_OF_OTHERS)


class FullFineTuning(nn.Module):
    """All weights of a model, the baseline that prompts are compared with.

    Args:
        backbone: a model of timm with its head; or of another library, whose own forward is run.
        num_classes: of a new head, where such a model has no place for one.

    Raises:
        UnsupportedBackbone: a model of another library that is not read.
    """

    backbone: Any
    head: nn.Linear | None
    view: BackboneView | None
    task: pae.TaskInfo | None = None
    transform: Callable[[Any], Tensor] | None = None  # as `PromptedViT.transform`

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        of_timm = hasattr(backbone, "get_classifier")
        # no part of what is trained beside the backbone: a plain attribute of no module
        self.view = None if of_timm else read_backbone(backbone)
        self.head = None
        if self.view is not None and self.view.head_name is None:
            like = self.view.like
            self.head = nn.Linear(self.view.feature_width, num_classes)
            self.head.to(like.device, like.dtype)
        self.backbone = backbone.requires_grad_(True)
        if not of_timm:
            for name, parameter in backbone.named_parameters():
                if name.endswith("mask_token"):  # of pretraining; processes that share gradients
                    parameter.requires_grad_(False)  # would wait for its

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Their names, in the order of the logits, where they are known."""
        return None if self.task is None else self.task.classes

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        if self.view is None:
            return int(self.backbone.num_classes)
        return int(self.classifier.out_features)

    @property
    def classifier(self) -> Any:
        """What gives the logits."""
        if self.view is None:
            return self.backbone.get_classifier()
        return self.view.head if self.head is None else self.head

    def forward(self, images: Tensor, engine: str = "fast") -> Tensor:
        """Logits (B, classes); both engines are the model's own forward, for no weight is
        frozen.
        """
        if self.view is None:
            return self.backbone(images)
        self.view.check_images(images)
        out = self.view.own_output(images)
        return out if self.head is None else self.head(out)

    def penalty(self) -> Tensor:
        """Nothing is regularised beyond weight decay."""
        return torch.zeros((), device=next(self.parameters()).device)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups: matrices are decayed; biases, norms and embeddings are not (timm's rule)."""
        from timm.optim import param_groups_weight_decay

        if self.view is None:
            own = list(getattr(self.backbone, "no_weight_decay", tuple)())
        else:  # what is no matrix of a product or a convolution, by its name
            own = [
                f"{place}.{name}" if place else name
                for place, part in self.named_modules()
                for name, _ in part.named_parameters(recurse=False)
                if isinstance(part, nn.Embedding) or not (name.endswith("weight") or name == "proj")
            ]
        groups: list[dict[str, Any]] = param_groups_weight_decay(
            self.backbone if self.view is None else self, weight_decay, no_weight_decay_list=own
        )
        return [{**group, "lr": lr} for group in groups]

    def trained_state(self) -> dict[str, Tensor]:
        """Every weight, by name."""
        return self.state_dict()

    def save(self, path: str | Path) -> None:
        """Writes the model's state dict as safetensors, atomically, with a digest; a head beside it
        as `NEW_HEAD`.
        """
        description = {
            "format": WHOLE if self.view is None else WHOLE_OF_OTHERS,
            "backbone": pae.checkpoint.backbone_name(self.backbone),
            "task": None if self.task is None else self.task.record(),
        }
        write_tensors(path, self._state(), {"pae": to_json(description)})

    def _state(self) -> dict[str, Tensor]:
        own = {} if self.head is None else self.head.state_dict(prefix=NEW_HEAD)
        return {**self.backbone.state_dict(), **own}

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: unreadable or damaged file, or weights of another model.
        """
        state, texts, vouched = read_tensors(path)
        known = any(name in texts.get("pae", "") for name in (WHOLE, WHOLE_OF_OTHERS))
        require_digest(path, vouched, former=not known)
        state = fitted(path, state, self._state())
        beside = {n: state.pop(n) for n in list(state) if n.startswith(NEW_HEAD)}
        self.backbone.load_state_dict(state)
        if self.head is not None:
            self.head.load_state_dict({n.removeprefix(NEW_HEAD): t for n, t in beside.items()})


def load_trained_state(module: Method, state: dict[str, Tensor], where: str | Path) -> None:
    """Puts the tensors of `module.trained_state()` back, exactly those and no others.

    Args:
        where: the file that they come from.
    Raises:
        CheckpointError: a name, a shape or a dtype differs, or a value is not finite.
    """
    state = fitted(where, state, module.trained_state())
    module.load_state_dict(state, strict=False)  # a frozen backbone is no part of `state`


def parameter_groups(module: Method, options: Options) -> list[dict[str, Any]]:
    """The module's groups for an optimiser, with the head's own weight decay if it has one."""
    groups = module.parameter_groups(options.lr, options.weight_decay)
    if options.head_weight_decay is not None:  # of a method with prompts
        for group in groups:
            if group["name"] == "head":
                group["weight_decay"] = options.head_weight_decay
    return groups


def trained_parameters(module: Method) -> int:
    """Number of parameters that the optimiser sees."""
    groups = module.parameter_groups(1.0, 0.0)
    counted = 0
    if isinstance(module, (pae.PromptedViT, pae.PromptedSegmenter)):
        module = module.model if isinstance(module, pae.PromptedSegmenter) else module
        counted = trained.count(module.backbone, module.trained_backbone)
        groups = [group for group in groups if group["name"] != "backbone"]
    return counted + sum(p.numel() for group in groups for p in group["params"])


def head_parameters(module: Method) -> int:
    """Number of those of the classifier alone."""
    head = module.classifier if isinstance(module, FullFineTuning) else module.head
    return sum(p.numel() for p in head.parameters())
