"""What a run is made of: one frozen record of options, written to config.json, enough to run it
again. An option is declared here, once, and nowhere else; see `pae.train.declared`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pae import choices
from pae.files import DIGEST, check_signature
from pae.protocols.tasks import NAMES as PROTOCOLS
from pae.train import hf_data
from pae.train.declared import Given, check, declared, near, option, parsed, read_table
from pae.train.embedded import DATASETS, MASKED, WEIGHTS_IMAGE_SIZE, WEIGHTS_NAME

TRAIN_ON = ("train", "trainval")
KEEPS = ("best", "last")
SCHEDULERS = ("cosine", "step", "poly", "vpt", "none")
_RISELESS = ("vpt", "none")  # vpt has a warm-up of its own
AMPS = ("auto", "bf16", "fp16", "no")
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("tensorboard", "wandb", "trackio")  # of those that accelerate writes to
HEAD_INITS = ("default", "vpt")
HEADS = ("linear", "pup")  # of segmentation
OWN_POOL = "own"
# models that may lie in a folder
LOCAL = re.compile(r"(local-dir:|open_clip:local-dir:|hf:)(.+)")
# timm's words; it passes over some that it does not know
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]|p(0?\.\d+|1)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|tweights))*"
)
MPA_PRECISIONS = ("auto", *choices.MPA_PRECISIONS)

FIRST = "digits"  # what `pae train` shows when nobody says what to train on
_FIRST = DATASETS[FIRST]
COMPARE = "compare"  # three methods side by side
PROMPTLESS = ("linear", "full")
# what only some runs have a use for; see `uses`
OF_PROMPTS = (
    *("num_tokens", "dropout", "spt", "method_args", "train_backbone"),
    "head_weight_decay",
)
OF_STEPS = ("rand_augment", "drop_path", "backbone_dropout")  # not of a linear probe
SWITCHES = ("kld", "mpa")  # and what begins with their names
_OF_PAIRS = ("class_names", "template", "base_to_new")

_MAX = 10**9  # of counts that nothing else bounds
# the groups of the help
_images = partial(option, "images")
_backbone = partial(option, "backbone")
_method = partial(option, "method")
_dense = partial(option, "segmentation")
_recipe = partial(
    option,
    "recipe (defaults depend on the method and are printed in config.json; in a comparison these "
    "apply to the prompt runs)",
)
_machine = partial(option, "machine")
_folder = partial(option, "run folder")
_ITS_OWN = "the method's own"


def methods() -> tuple[str, ...]:
    """What --method takes. The families are those that are registered, so torch gets imported."""
    from pae.prompts import METHODS, PAIRS

    return (COMPARE, *PROMPTLESS, *METHODS, *PAIRS)


@dataclass(frozen=True)
class Options:
    """Everything that decides the numbers of a run; what each means is its declaration's text.

    A type without None is that of resolved options; until then, None stands for what `unset` says.
    """

    dataset: str | None = _images(
        None, "an embedded image set", choices=(*DATASETS, *MASKED), metavar="NAME", unset=FIRST
    )
    data: str | None = _images(
        None,
        "a folder: train/CLASS/ with optional val/ and test/; or images/ with "
        "train800.txt, val200.txt, test.txt (VTAB-1k); or train.json, val.json, test.json"
        " (FGVC); or TensorFlow Datasets; or hf:NAME or hf:FOLDER of Hugging Face datasets; of "
        "clips train/CLASS/*.npy",
        metavar="FOLDER",
    )
    task: str = _images(
        "classification",
        "what is learned: a class per image; segmentation, a class per pixel; clip, two towers",
        choices=choices.TASKS,
    )
    class_names: str | None = _images(
        None,
        "task clip: a file with the name of a class a line, in the order of the folders",
        metavar="FILE",
        unset="the folders' names as words",
    )
    template: str | None = _images(
        None,
        "task clip: the text of a class, {} for its name; of learned rows in front of the name, "
        "what stands behind it counts",
        metavar="TEXT",
        unset="a photo of a {}.; with learned rows {}.",
    )
    base_to_new: bool = _images(
        False,
        "task clip: train on the first half of the classes, and measure the other half too",
        negated=False,
    )
    image_column: str | None = _images(
        None,
        "data hf:NAME or TensorFlow Datasets: the column of the images",
        metavar="NAME",
        unset="the one of that type",
    )
    label_column: str | None = _images(
        None,
        "data hf:NAME or TensorFlow Datasets: the column of the classes",
        metavar="NAME",
        unset="the one of that type",
    )
    protocol: str | None = _images(
        None,
        "the folder is a task of it, or holds its tasks: classes, splits and pixels are those of "
        "the protocol, or it is said",
        choices=PROTOCOLS,
    )
    protocol_task: str | None = _images(
        None,
        "task of the protocol, by any of its names",
        metavar="NAME",
        unset="what the folder is called",
    )
    shots: int | None = _images(
        None,
        "protocol few-shot: training images of each class (1, 2, 4, 8, 16)",
        low=1,
        high=1024,
    )
    draw: int = _images(0, "protocol few-shot: which of the drawn lists", low=0, high=2**32 - 1)
    train_on: str = _images(
        "train",
        "trainval: train on the validation images too (VTAB-1k: train800val200), the last step of "
        "a protocol; nothing is validated then, and the last epoch is tested",
        choices=TRAIN_ON,
    )
    train_size: int | None = _images(
        None, "training images, a stratified choice", low=1, high=_MAX, unset="all; embedded: 800"
    )
    val_size: int | None = _images(
        None,
        "validation images cut from training",
        low=1,
        high=_MAX,
        unset="a fifth; embedded: 200",
    )
    test_size: int | None = _images(
        None,
        "test images, a stratified choice that is the same for all seeds",
        low=1,
        high=_MAX,
        unset="all",
    )
    split_seed: int | None = _images(
        None,
        "of the choice of training and validation images",
        low=0,
        high=2**32 - 1,
        unset="the seed",
    )
    augment: str = _images(
        "none",
        "none: squash to a square, VTAB's protocol; crop: random crop and flip, VPT's "
        "protocol for FGVC; timm: timm's random resized crop, flip, jitter",
        choices=choices.AUGMENTS,
    )
    rand_augment: str | None = _images(
        None,
        "RandAugment of training images, after crop and flip, in timm's words, e.g. "
        "rand-m9-mstd0.5-inc1; with augment timm instead of its jitter",
        metavar="TEXT",
        unset="none",
    )
    interpolation: str = _images(
        "model",
        "of the resize: the backbone's own (model), bilinear and bicubic as PIL does them, or the "
        "former bilinear rule of TensorFlow (VTAB and VPT read their images by it; augment none)",
        choices=choices.INTERPOLATIONS,
    )
    norm: str = _images(
        "model",
        "channel normalisation: the backbone's own (model) or another",
        choices=choices.NORMS,
    )

    model: str = _backbone(
        WEIGHTS_NAME,
        f"{WEIGHTS_NAME} (embedded), any timm vision transformer, hf-hub:NAME, local-dir:FOLDER; "
        "hf:NAME or hf:FOLDER of transformers, open_clip:NAME/TAG",
        metavar="NAME",
    )
    weights: str | None = _backbone(None, "local file of weights for a timm model", metavar="FILE")
    pretrained: bool = _backbone(True, "load pretrained weights; without, they are random")
    img_size: int | None = _backbone(
        None,
        "image side in pixels",
        low=1,
        high=16_384,
        unset=f"the model's own; embedded: {WEIGHTS_IMAGE_SIZE}, of {FIRST} {_FIRST.image_size}",
    )

    pool: str = _backbone(
        OWN_POOL,
        "own: the model's readout; else a mean of the last block's rows, in a class token's place "
        "with a frozen norm behind it (new, or that of weights tuned so), as on MAE: the image's, "
        "all, the prompts'",
        choices=(OWN_POOL, *choices.POOLS),
    )

    drop_path: float = _backbone(
        0.0,
        "stochastic depth of the backbone in training, growing to this rate in the last block; "
        "engine reference alone",
        low=0,
        below=1,
        metavar="P",
    )
    backbone_dropout: float = _backbone(
        0.0,
        "dropout of the backbone in training: behind the position embedding, attention and the "
        "layers of the MLP; engine reference alone",
        low=0,
        below=1,
        metavar="P",
    )

    method: str = _method(
        COMPARE,
        "compare: linear, vpt-deep, and vpt-deep with --kld --mpa",
        choices=methods,
        metavar="NAME",
    )
    method_args: dict[str, Any] = _method(  # noqa: RUF009 (a field, like the others)
        dict,
        "further arguments of the method's prompt family, e.g. rank=16; values are JSON or text",
    )
    engine: str = _method(
        "fast",
        "fast: pae.fast_forward; reference: the definition; the curves agree",
        choices=choices.ENGINES,
    )
    train_backbone: str | None = _method(
        None,
        "also train of the backbone: biases, da-vpt+, or names and patterns with commas between, "
        "e.g. cls_token,blocks.*.norm1.*",
        metavar="LIST",
        unset="nothing",
    )
    num_tokens: int = _method(10, "prompts per block", low=0, high=100_000)
    dropout: float | None = _method(
        None,
        "prompt dropout, one mask per batch",
        low=0,
        below=1,
        metavar="P",
        unset="0; upt, upt-deep: 0.1",
    )
    spt: str | None = _method(
        None, "start from tokens of training images", choices=choices.SPT_METHODS
    )
    head_init: str = _method(
        "default", "default: PyTorch's; vpt: Kaiming fan-out and bias -log 99", choices=HEAD_INITS
    )
    kld: bool = _method(False, "add the Koopman-Lyapunov regulariser of PAE")
    kld_dim: int = _method(256, "its width", low=1, high=65_536)
    kld_mode: str = _method("global", "one operator, or one per block", choices=choices.KLD_MODES)
    kld_formulation: str = _method(
        "code", "as in the released code or in the paper", choices=choices.KLD_FORMULATIONS
    )
    kld_gauge: str = _method(
        "none", "layernorm: see prompts as the network does", choices=choices.KLD_GAUGES
    )
    kld_consistency: float = _method(0.5, "weight of its consistency term", low=0, metavar="W")
    kld_lyapunov: float = _method(0.2, "weight of its stability term", low=0, metavar="W")
    mpa: bool = _method(False, "initialise prompts by Modal Pre-Alignment (PAE)")
    mpa_images: int = _method(
        None, "training images it looks at", low=1, high=10**6, unset="8 on a CPU, 64 on a GPU"
    )
    mpa_window: int = _method(16, "side of its frequency windows", low=1, high=16_384)
    mpa_stride: int = _method(8, "step of its frequency windows", low=1, high=16_384)
    mpa_head: str = _method(
        "as_is",
        "what ranks the windows: the untrained head (published) or a probe",
        choices=choices.MPA_HEADS,
    )
    mpa_search: str = _method(
        "exact",
        "every window on every image, or halving: drop those that cannot win",
        choices=choices.MPA_SEARCHES,
    )
    mpa_precision: str = _method(
        "auto",
        "exact: rank in the backbone's precision; bf16: with near-ties checked; auto: bf16 where "
        "amp is and the CPU multiplies it at least three times as fast",
        choices=MPA_PRECISIONS,
    )

    head: str = _dense(
        HEADS[0],
        "linear: one layer per patch; pup: SETR's progressive upsampling",
        choices=HEADS,
    )
    head_channels: int = _dense(256, "channels of pup's convolutions", low=1, high=65_536)
    out_blocks: str | None = _dense(
        None,
        "blocks whose rows the heads read, with commas between: one for each auxiliary head, then "
        "that of the head",
        metavar="LIST",
        unset="pup: four as published, at 10, 15, 20 and 24 of 24; linear: the last",
    )
    auxiliary_weight: float = _dense(
        0.4, "weight of the loss of each auxiliary head; 0: there are none", low=0, metavar="W"
    )
    reduce_zero_label: bool = _dense(
        False, "masks count from 1, and 0 is no class (ADE20K's annotations)"
    )

    epochs: int = _recipe(
        None,
        "passes over the training images",
        low=1,
        high=10**6,
        unset=f"{_ITS_OWN}; comparison: 3, of {FIRST} {_FIRST.recipe['epochs']}",
    )
    batch_size: int = _recipe(
        None, "images per step, over all processes", low=1, high=10**6, unset=_ITS_OWN
    )
    per_class: int | None = _recipe(
        None,
        "images of a class in a batch, which has as many classes as fit (DA-VPT: 2)",
        low=1,
        high=10**6,
        unset="every image once per epoch",
    )
    optimizer: str = _recipe(None, "any of timm's, e.g. adamw, sgd", metavar="NAME", unset=_ITS_OWN)
    lr: float = _recipe(None, "peak learning rate", above=0, metavar="LR", unset=_ITS_OWN)
    weight_decay: float = _recipe(
        None, "not on the head's bias", low=0, metavar="W", unset=_ITS_OWN
    )
    head_weight_decay: float | None = _recipe(
        None, "of the head's weight", low=0, metavar="W", unset="weight_decay"
    )
    clip_norm: float | None = _recipe(
        None,
        "every step: largest norm of all gradients together, which are scaled down to it",
        above=0,
        metavar="X",
        unset="no clip",
    )
    clip_value: float | None = _recipe(
        None,
        "every step: largest entry of a gradient, which is cut off there",
        above=0,
        metavar="X",
        unset="no clip",
    )
    label_smoothing: float = _recipe(
        0.0,
        "share of the target that is spread over all classes, in the training loss",
        low=0,
        below=1,
        metavar="P",
    )
    ema: float | None = _recipe(
        None,
        "decay of a moving average of what is trained; it is what is validated, saved and tested",
        above=0,
        below=1,
        metavar="D",
        unset="no average",
    )
    poly_power: float = _recipe(
        0.1, "exponent of scheduler poly (mmsegmentation: 0.9)", above=0, metavar="X"
    )
    scheduler: str = _recipe(
        "cosine",
        "learning rate over the steps; vpt: per epoch, as in VPT's code, epoch 0 at 0 if there is "
        "a warm-up",
        choices=SCHEDULERS,
    )
    warmup_epochs: float = _recipe(
        None, "of warm-up", low=0, metavar="N", unset=f"{_ITS_OWN}, at most a quarter"
    )
    warmup_lr: float | None = _recipe(
        None,
        "constant rate of the warm-up, as of CoOp's epoch at 1e-5",
        above=0,
        metavar="LR",
        unset="coop, dapt and upt: 1e-5; else it rises from 0 to the peak",
    )
    seed: int = _recipe(0, "of initialisation, order, dropout", low=0, high=2**32 - 1)

    device: str = _machine("auto", "auto: the GPU if there is one", choices=DEVICES)
    amp: str = _machine("auto", "mixed precision; auto: bf16 where it is faster here", choices=AMPS)
    workers: int = _machine(
        None, "decoding threads or processes", low=0, high=1024, unset="the CPUs, up to 8"
    )

    keep: str = _folder(
        None,
        "the epoch that best.safetensors keeps and that is tested: of the best validation "
        "accuracy, or the last (as the papers' protocols say)",
        choices=KEEPS,
        unset="best; with train_on trainval last",
    )
    save_every_steps: int = _folder(
        0, "also save the state every N steps, not only after every epoch", low=0, high=_MAX
    )

    @property
    def is_comparison(self) -> bool:
        """Whether it stands for the three runs of `pae.train.compare`."""
        return self.method == COMPARE

    @property
    def has_prompts(self) -> bool:
        """Whether prompts are trained (in a comparison, where the method leaves it open)."""
        return self.method not in PROMPTLESS

    def resolved(self, given: Given | None = None) -> Options:
        """A copy in which every None of the recipe and every "auto" is the value it stands for.

        Args:
            given: who gave what, for the messages.
        Raises:
            ValueError: an option that is of another type, out of range, unknown, or contradicts
                another.
        """
        called = partial(self.called, given or Given())
        values = check(self, given or Given())
        self._check_together(called)
        if self.data is None and self.dataset is None:
            values["dataset"] = next(iter(MASKED)) if self.task == "segmentation" else FIRST
        embedded = DATASETS.get(values["dataset"])
        recipe = _RECIPES.get(self.method, _PROMPTS)
        if self.task == "segmentation":
            recipe = _SEGMENTATION[self.head, self.has_prompts]
        if embedded is not None and self.is_comparison:
            recipe = {**recipe, **embedded.recipe}
        if embedded is not None and self.model == WEIGHTS_NAME and self.img_size is None:
            values["img_size"] = embedded.image_size
        values.update({name: value for name, value in recipe.items() if values[name] is None})
        if self.warmup_epochs is None:
            values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
        if values["scheduler"] == "vpt" and values["warmup_epochs"] and values["epochs"] == 1:
            raise ValueError(
                f"{called('scheduler')}: a warm-up begins with an epoch at learning rate 0, and "
                "the run has no other; give more --epochs, or --warmup-epochs 0"
            )
        if not values["warmup_epochs"] or values["scheduler"] in _RISELESS:
            if self.warmup_lr is not None:
                raise ValueError(
                    f"{called('warmup_lr')} needs --warmup-epochs above 0, and --scheduler cosine, "
                    "step or poly"
                )
            values["warmup_lr"] = None  # a recipe's own
        per_class, batch = values["per_class"], values["batch_size"]
        if per_class is not None and batch % per_class:
            raise ValueError(
                f"{called('per_class')}: expected a divisor of the batch size, which is {batch}"
            )
        device = values["device"] = resolve_device(self.device, called)
        amp = values["amp"] = _resolve_amp(self.amp, device, called)
        if self.mpa_precision == "auto":
            fast = amp == "bf16" and device == "cpu" and bf16_gain() > _MPA_GAIN
            values["mpa_precision"] = "bf16" if fast else "exact"
        if self.mpa_images is None:
            values["mpa_images"] = 64 if device == "cuda" else 8
        if self.workers is None:
            values["workers"] = _default_workers()
        if self.keep is None:
            values["keep"] = "best" if self.train_on == "train" else "last"
        for name in ("data", "weights"):  # a resumed run may start elsewhere
            if name == "data" and values[name] is not None and hf_data.is_hf(values[name]):
                values[name] = hf_data.absolute(values[name])
            elif values[name] is not None:
                values[name] = os.path.abspath(os.path.expanduser(values[name]))
        found = LOCAL.fullmatch(values["model"])
        if found and (found[1] != "hf:" or os.path.isdir(os.path.expanduser(found[2]))):
            values["model"] = found[1] + os.path.abspath(os.path.expanduser(found[2]))
        return Options(**values)

    def called(self, given: Given, name: str) -> str:
        """What a message calls option `name` with its value."""
        return given.call(declared(Options)[name], getattr(self, name))

    def _check_together(self, called: Callable[[str], str]) -> None:
        """Raises ValueError for the first options that contradict each other."""

        def both(first: str, second: str) -> None:
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"{called(first)} and {called(second)} exclude each other")

        if self.task != "segmentation":
            for name, own in declared(Options).items():
                if own.group == "segmentation" and getattr(self, name) != own.default:
                    raise ValueError(f"{called(name)} needs --task segmentation")
        if self.task == "segmentation" and self.is_comparison:
            raise ValueError(
                f"--task segmentation does not run the comparison of {called('method')}: give "
                "--method linear (the heads alone) or one with prompts"
            )
        if self.poly_power != 0.1 and self.scheduler != "poly":
            raise ValueError(f"{called('poly_power')} needs --scheduler poly")
        both("data", "dataset")
        both("mpa", "spt")
        both("clip_norm", "clip_value")
        for name in ("class_names", "template", "base_to_new"):
            if getattr(self, name) and self.task != "clip":
                raise ValueError(f"{called(name)} needs --task clip")
        from pae.prompts import PAIRS

        if self.method in PAIRS and self.task != "clip":
            raise ValueError(f"{called('method')} has prompts for two towers: it needs --task clip")
        if self.protocol is not None and self.data is None:
            raise ValueError(f"{called('protocol')} needs --data, a folder of its tasks")
        for name in ("image_column", "label_column"):
            if getattr(self, name) is not None and self.data is None:
                raise ValueError(f"{called(name)} needs --data hf:NAME, or TensorFlow Datasets")
        for name in ("protocol_task", "shots", "draw"):
            needs = "few-shot" if name != "protocol_task" else self.protocol or PROTOCOLS[0]
            if getattr(self, name) and self.protocol != needs:
                raise ValueError(f"{called(name)} needs --protocol {needs}")
        if self.protocol == "few-shot" and self.shots is None:
            raise ValueError(f"{called('protocol')} needs --shots, images of each class")
        if self.train_on == "trainval" and self.keep == "best":
            raise ValueError(
                f"{called('keep')} and {called('train_on')}: no images are left to find the best "
                "epoch by; the last one is tested"
            )
        for name in ("augment", "rand_augment"):
            if self.interpolation == choices.LEGACY and getattr(self, name) not in ("none", None):
                raise ValueError(
                    f"{called('interpolation')} and {called(name)}: the former rule of TensorFlow "
                    "is for images squashed to a square and otherwise as they are"
                )
        for name in ("kld", "mpa", "spt", "method_args", "train_backbone"):
            if getattr(self, name) and self.is_comparison:
                includes = "; the comparison includes it" if name in ("kld", "mpa") else ""
                raise ValueError(f"{called(name)} needs a --method with prompts{includes}")
        for name in ("kld", "mpa", "spt", "method_args", "train_backbone", "dropout"):
            if getattr(self, name) and not self.has_prompts:
                raise ValueError(f"{called(name)} needs a --method with prompts, not {self.method}")
        if self.pool == "prompts" and (self.is_comparison or not self.has_prompts):
            raise ValueError(f"{called('pool')} needs a --method with prompts, not {self.method}")
        if self.head_weight_decay is not None and not self.has_prompts:
            raise ValueError(
                f"{called('head_weight_decay')} needs a --method with prompts, not {self.method}; "
                "--weight-decay is the head's too"
            )
        for name in ("rand_augment", "drop_path", "backbone_dropout"):
            if getattr(self, name) and self.method == "linear":
                raise ValueError(
                    f"{called(name)} is drawn anew in every step, and linear computes the features "
                    "of its images once"
                )
        for name in ("drop_path", "backbone_dropout"):
            if getattr(self, name) and self.has_prompts and self.engine != "reference":
                raise ValueError(
                    f"{called(name)} needs --engine reference: the fast one has folded the frozen "
                    "blocks, and draws nothing in them"
                )
        if self.rand_augment is not None and not _RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"{called('rand_augment')}: expected rand, then any of -mN -nN -pX -mstdX -mmaxN "
                "-inc1 -tweights, e.g. rand-m9-mstd0.5-inc1"
            )
        if self.method == "full" and self.head_init == "vpt":
            raise ValueError(
                f"{called('head_init')} is for linear and for methods with prompts, not full"
            )
        if self.kld and self.method.endswith("-shallow"):
            raise ValueError(
                f"{called('kld')} couples the prompts of successive blocks, and {self.method} has "
                "some in block 0 alone"
            )
        if self.num_tokens == 0 and (self.kld or self.mpa):
            first = called("kld" if self.kld else "mpa")
            raise ValueError(f"{called('num_tokens')}: expected at least 1 with {first}")
        if self.weights is not None and not self.pretrained:
            raise ValueError(f"{called('weights')} and {called('pretrained')} exclude each other")


@dataclass(frozen=True)
class Launch:
    """How to run, not what: options of the command line that no file holds."""

    config: str | None = _folder(
        None,
        "options (num_tokens = 10, ...) and a table [method_args]; or the config.json of "
        "a run; or published settings by name, e.g. vpt-deep. Options given here win",
        metavar="FILE",
    )
    output: str | None = _folder(
        None, "folder of the run", metavar="FOLDER", unset="runs/<data>-NNN"
    )
    resume: str | None = _folder(
        None,
        "go on with the run in this folder; its options hold. auto: with the one in --output if "
        "there is one, else begin it",
        metavar="FOLDER",
    )
    previous_state: bool = _folder(
        False, "with --resume: go on from the state before the last one", negated=False
    )
    log_with: str | None = _folder(
        None,
        "also log to a tracker, whose package must be installed",
        choices=TRACKERS,
        unset="the run's folder alone",
    )
    quiet: bool = _folder(False, "print the result only", negated=False)
    debug: bool = _folder(False, "show tracebacks", negated=False)


# what None means, per method; found on validation images only, never on test images
_PROMPTS = {
    "epochs": 10,
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 1e-2,
    "weight_decay": 1e-4,
    "warmup_epochs": 0.5,
}
_COOP = {
    "epochs": 50,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 2e-3,
    "weight_decay": 5e-4,
    "warmup_epochs": 1.0,
    "warmup_lr": 1e-5,
}
_UPT = {**_COOP, "dropout": 0.1}
_RECIPES: dict[str, dict[str, Any]] = {
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
    # not searched but taken over: the top of the authors' range. Prompts that start shorter than
    # VPT's turn faster at the same rate
    "da-vpt": {**_PROMPTS, "lr": 5e-3},
    # taken over too: CoOp's and its followers', whose epochs grow with the shots
    **dict.fromkeys(("coop", "dapt"), _COOP),
    **dict.fromkeys(("upt", "upt-deep"), _UPT),
    COMPARE: {**_PROMPTS, "epochs": 3},  # it is to end in minutes on a CPU
}
# of segmentation, per head, without prompts and with: docs/segmentation.md, "A drawn task"
_PIXELS = {**_PROMPTS, "batch_size": 8, "lr": 3e-3}
_SEGMENTATION: dict[tuple[str, bool], dict[str, Any]] = {
    ("linear", False): {**_PIXELS, "epochs": 20, "lr": 1.5e-2},
    ("linear", True): _PIXELS,
    ("pup", False): {**_PIXELS, "optimizer": "sgd", "lr": 0.05},
    ("pup", True): _PIXELS,
}
# the options that a recipe is made of; what a linear probe, beside prompts, has of its own
RECIPE = (
    *_PROMPTS,
    *("rand_augment", "drop_path", "backbone_dropout", "per_class"),
    *("head_weight_decay", "clip_norm", "clip_value", "label_smoothing", "ema", "warmup_lr"),
)


def uses(option: str, values: Mapping[str, Any]) -> bool:
    """Whether a run with these options has a use for one of them; what is missing among them is at
    its default.
    """
    known = declared(Options)

    def get(name: str) -> Any:
        return values.get(name, known[name].default)

    method, task = get("method"), get("task")
    switch, _, rest = option.partition("_")
    if switch in SWITCHES and rest:
        return method == COMPARE or bool(get(switch))
    if option in (*OF_PROMPTS, *SWITCHES):
        return method not in PROMPTLESS
    if option in OF_STEPS:
        return method != "linear"
    if known[option].group == "segmentation":
        return task == "segmentation"
    if option in _OF_PAIRS:
        return task == "clip"
    if option == "protocol_task":
        return get("protocol") is not None
    if option in ("shots", "draw"):
        return get("protocol") == "few-shot"
    return option != "poly_power" or get("scheduler") == "poly"


def _stops(option: str, values: Mapping[str, Any]) -> bool:
    """Whether these options are refused because of one that the run has no use for."""
    free = option == "num_tokens" or option.partition("_")[0] in SWITCHES
    is_set = bool(values[option]) or declared(Options)[option].group == "segmentation"
    return is_set and not free and not uses(option, values)


def in_use(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of resolved options those that the run has a use for, each None as what it stands for: two
    runs are one if these agree.
    """
    stands_for = {
        "dropout": 0.0,
        "head_weight_decay": values.get("weight_decay"),
        "split_seed": values.get("seed"),
    }
    known = declared(Options)
    return {
        name: stands_for.get(name) if value is None else value
        for name, value in values.items()
        if name in known and uses(name, values)
    }


# ---- files

CONFIGS = Path(__file__).parents[1] / "configs"
# what options of older files are called now
_FORMER_NAMES = {"family": "method_args"}
_FORMER_WORDS = {("engine", "textbook"): "reference"}


def shipped() -> dict[str, Path]:
    """The published settings that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.toml"))}


def find_config(name: str) -> Path:
    """The file that --config names: a path, or the name of published settings.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise ValueError(
        f"--config {name}: expected a file or one of {', '.join(known)}{near(path.stem, known)}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The checked options of a TOML or a JSON file, or those of a run in its config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: an unknown name, a value that an option does not take, or the config.json of a
            run that is not what was written.
    """
    record, known = parsed(path), declared(Options)
    if "settings" in record:  # the config.json of a run: the rest of it are facts, e.g. versions
        try:
            facts = check_signature(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        as_written, record = DIGEST in record, record["settings"]
        if not isinstance(record, dict):
            raise ValueError(f"{path}: settings: expected a table of options")
        if facts.get("comparison") is True:  # formerly beside the settings
            record = {**record, "method": COMPARE}
        if as_written:  # what the run has no use for may have had another default then
            table = renamed(record)
            record = {n: v for n, v in table.items() if n not in known or not _stops(n, table)}
    return read_options(path, record)


def read_options(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The checked options of a table, which messages say is in `path`.

    Raises:
        ValueError: an unknown name, or a value that an option does not take.
    """
    return read_table(path, renamed(table), Options, _FORMER_NAMES, _FORMER_WORDS)


def renamed(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """`table`, in which a protocol's task, once called task, has its name of today."""
    former = table.get("task", choices.TASKS[0])
    if former in choices.TASKS or not (former is None or table.get("protocol")):
        return table
    rest = {name: value for name, value in table.items() if name != "task"}
    return rest if former is None else {**rest, "protocol_task": former}


def combine(
    path: Path | None, in_file: Mapping[str, Any], on_line: Mapping[str, Any]
) -> tuple[Options, Given]:
    """The options of a file and of the command line, which wins, and who gave which.

    `method_args` are joined name by name. A folder of images on one side replaces the image set of
    the other.

    Raises:
        ValueError: another method on the command line than in the file; an option of KLD or MPA
            where neither side says whether there is one.
    """
    in_file = dict(in_file)
    method = declared(Options)["method"]
    if "method" in in_file and on_line.get("method", in_file["method"]) != in_file["method"]:
        raise ValueError(
            f"{Given().call(method, on_line['method'])}: {path} is for {in_file['method']}"
        )
    if {"data", "dataset"} & on_line.keys():
        in_file.pop("data", None)
        in_file.pop("dataset", None)
    values = {**in_file, **on_line}
    arguments = {**in_file.get("method_args", {}), **on_line.get("method_args", {})}
    if arguments:
        values["method_args"] = arguments
    given = Given({name: str(path) for name in in_file.keys() - on_line.keys()})
    for name, value in values.items():
        switch = name.partition("_")[0]
        if switch not in ("kld", "mpa") or name == switch or switch in values:
            continue  # an explicit --no-kld leaves the rest of it unused on purpose
        if values.get("method", COMPARE) != COMPARE:  # the comparison has both
            raise ValueError(f"{given.call(declared(Options)[name], value)} needs --{switch}")
    return Options(**values), given


# ---- the machine


def resolve_device(device: str, called: Callable[[str], str] | None = None) -> str:
    """ "cuda" or "cpu" of what --device says; `called` as of `Options.called`.

    Raises:
        ValueError: a GPU is asked for, and none is usable.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        asked = "--device cuda" if called is None else called("device")
        raise ValueError(f"{asked}: no usable GPU here")
    return device


def _resolve_amp(amp: str, device: str, called: Callable[[str], str]) -> str:
    """The precision that "auto" stands for here: bf16 where it pays."""
    import torch

    if amp == "fp16" and device == "cpu":
        raise ValueError(f"{called('amp')}: a GPU is needed; use bf16 or no on the CPU")
    if amp != "auto":
        return amp
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if bf16_gain() > _AMP_GAIN else "no"


# how many times as fast as in fp32 products in bf16 must be: in training by a quarter; in MPA more,
# for up to 62 % of the windows were measured again in fp32 (docs/science.md)
_AMP_GAIN, _MPA_GAIN = 1.25, 3.0


@lru_cache
def bf16_gain() -> float:
    """How many times as fast as fp32 this processor multiplies bf16; 0 where it has to emulate it.

    Its instructions do not tell: with AMX a product is several times as fast, with AVX-512's dot
    products alone it may be half as fast. So one of a transformer's size is timed, in turns, which
    takes some 50 ms; the answers of processors lie far from the bounds.
    """
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16")):
        return 0.0
    wide = torch.ones(256, 768), torch.ones(768, 768)
    narrow = tuple(t.bfloat16() for t in wide)
    ratios = []
    for _ in range(7):
        seconds = []
        for rows, weight in (wide, narrow):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return sorted(ratios)[len(ratios) // 2]


def _default_workers() -> int:
    """The CPUs that this process may use, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)
