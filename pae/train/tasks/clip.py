"""Two towers: images among the texts of their classes, by prompts in one tower or in both.

Of a run's result beside the accuracy: that of the model without prompts (zero-shot), and with
`base_to_new` those on classes that training never saw, and the harmonic means of both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pae
from pae.backbones import named
from pae.prompts import METHODS, PAIRS, Pair
from pae.prompts.dapt import DAPT
from pae.train import methods, pixels
from pae.train.data import Images, Task
from pae.train.declared import Given, declared
from pae.train.options import Options
from pae.train.tasks import classification
from pae.train.tasks.kind import Shown

# options that have nothing to act on here, and what stands for them
UNUSED = {
    "mpa": "in a script PromptedCLIP.mpa_init does it, against the texts",
    "weights": "they are those of --model",
    "img_size": "the towers take their own size",
    "pool": "the image tower has its own readout",
    "head_init": "there is no head: the texts are",
    "head_weight_decay": "there is no head: the texts are",
    "drop_path": "the towers are frozen",
    "backbone_dropout": "the towers are frozen",
}


class Scores(NamedTuple):
    """Logits (B, C), unit features of the images (B, E) and of the texts (C, E)."""

    logits: Tensor
    images: Tensor
    texts: Tensor


class Trained(nn.Module):
    """A `PromptedCLIP` with the face that the loop asks for; see `pae.train.methods`.

    Attributes:
        clip: the model. prototypes: (C, E) of DAPT, part of a run's state and of no file.
    """

    task: pae.TaskInfo | None = None
    prototypes: Tensor | None

    def __init__(self, clip: pae.PromptedCLIP) -> None:
        super().__init__()
        self.clip, self.head = clip, nn.Identity()  # no head is trained
        found = None
        if isinstance(clip.pair, DAPT):
            width = clip.text.view.shape.feature_width
            found = torch.zeros(clip.num_classes, width)
        self.register_buffer("prototypes", found)

    @property
    def backbone(self) -> nn.Module:
        """Of the image tower."""
        return self.clip.vision.backbone

    def forward(self, images: Tensor, engine: str = "fast") -> Scores:
        """Of images (B, 3, H, W)."""
        if self.training and self.prototypes is not None:
            self.clip.pair.prototypes = self.prototypes
        found, texts = self.clip.features(images, engine), self.clip.text_features(engine)
        return Scores(self.clip.logits(found, texts), found, texts)

    def penalty(self) -> Tensor:
        """As `PromptedCLIP.penalty`."""
        return self.clip.penalty()

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """As `PromptedCLIP.parameter_groups`."""
        return self.clip.parameter_groups(lr, weight_decay)

    def trained_state(self) -> dict[str, Tensor]:
        """As `PromptedCLIP.trained_state`, and the prototypes."""
        state = {f"clip.{name}": t for name, t in self.clip.trained_state().items()}
        return state if self.prototypes is None else {**state, "prototypes": self.prototypes}

    def save(self, path: str | Path) -> None:
        """As `PromptedCLIP.save`."""
        self.clip.save(path, task=self.task)

    def load(self, path: str | Path) -> None:
        """As `PromptedCLIP.load`."""
        self.clip.load(path)


class Own(classification.Own):
    """The task of this module."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._unseen: Task | None = None  # the new classes, their images in `test`: of `read`
        self._shown: Shown | None = None
        self._module: Trained | None = None

    # ---- before the first step

    def rehearse(self, given: Given | None = None) -> None:
        options = self.options
        called = partial(options.called, given or Given())
        if not named.is_named(options.model):
            raise ValueError(
                f"{called('model')}: --task clip needs a model of two towers, open_clip:NAME/TAG, "
                "hf:NAME or hf:FOLDER"
            )
        if options.method not in PAIRS and options.method not in METHODS:
            known = ", ".join(sorted({*PAIRS, *METHODS}))
            raise ValueError(f"{called('method')}: --task clip expects one of {known}")
        for name, instead in UNUSED.items():
            if getattr(options, name) != declared(Options)[name].default:
                raise ValueError(f"{called(name)}: not with --task clip: {instead}")
        if options.data is not None and not Path(options.data).is_dir():
            raise ValueError(f"{called('data')}: no such folder")
        if options.class_names is not None and not Path(options.class_names).is_file():
            raise ValueError(f"{called('class_names')}: no such file")
        if options.template is not None and options.template.count("{}") != 1:
            raise ValueError(f"{called('template')}: expected one {{}} for the name of a class")
        if options.method in PAIRS:
            pair = self._pair(1, called)
            own = getattr(pair.text, "num_classes", 0)
            if own and options.base_to_new:
                raise ValueError(
                    f"{called('base_to_new')}: num_classes={own} gives each class rows of its own, "
                    "and new classes would have none"
                )
        else:
            methods.build_prompts(options, 2, given)

    def read(self) -> Task:
        task = super().read()
        names = self._names(task)
        task = dataclasses.replace(task, classes=tuple(names))
        if not self.options.base_to_new:
            return task
        half = (len(names) + 1) // 2  # as CoCoOp cuts them
        if half < 2 or len(names) - half < 1 or task.test is None:
            raise ValueError(
                f"{task.name}: base-to-new evaluation needs 3 classes and test images, got "
                f"{len(names)} classes and {len(task.test or ())} test images"
            )
        base, new = range(half), range(half, len(names))
        self._unseen = dataclasses.replace(
            task, classes=tuple(names[half:]), test=_of_classes(task.test, new)
        )
        parts = {
            split: None if images is None else _of_classes(images, base)
            for split, images in (("train", task.train), ("val", task.val), ("test", task.test))
        }
        return dataclasses.replace(task, classes=tuple(names[:half]), **cast(Any, parts))

    def _names(self, task: Task) -> list[str]:
        """Of a file, else of the folders, with spaces for what stands for them."""
        path = self.options.class_names
        if path is None:
            if self.options.data is not None and all(name.isdigit() for name in task.classes):
                raise ValueError(
                    f"{task.name}: its classes have numbers for names ({task.classes[0]}, ...), "
                    "and texts are made of names: give --class-names FILE, a name a line in the "
                    "order of the numbers"
                )
            return [readable(name) for name in task.classes]
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        if len(lines) != len(task.classes):
            raise ValueError(
                f"{path}: expected a name a line for each of the {len(task.classes)} classes, got "
                f"{len(lines)}"
            )
        return lines

    def build(self, task: Task, say: Callable[[str], None] | None = None) -> Trained:
        self._module = Trained(self._prompted(task.classes, say=say))
        return self._module

    def _pair(self, classes: int, called: Callable[[str], str]) -> Pair:
        options = self.options
        kind = PAIRS[options.method]
        try:
            arguments = methods.arguments_of(options, kind, called, ("num_tokens", "dropout"))
            return kind(**arguments)
        except TypeError as error:
            raise ValueError(f"{called('method_args')}: {error}") from error

    def _prompted(
        self,
        classes: Iterable[str],
        prompts: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> pae.PromptedCLIP:
        """A model for these classes; without `prompts` the zero-shot one."""
        options, names = self.options, list(classes)
        with torch.random.fork_rng(devices=[]):  # random towers are the same in all models of a run
            torch.manual_seed(options.seed)
            found = named.load_two_towers(options.model, pretrained=options.pretrained, say=say)
        model, tokenizer, facts = found
        given: dict[str, Any] = {"class_names": names, "template": options.template}
        if not prompts:
            given["template"] = options.template or "a photo of a {}."
        elif options.method in PAIRS:
            given["pair"] = self._pair(len(names), partial(options.called, Given()))
            if options.template is not None and given["pair"].text.num_tokens:
                given["template"] = _behind_context(options.template)
        else:
            given["image_prompts"] = methods.build_prompts(options, len(names))
        made = pae.prompted_clip(model, tokenizer=tokenizer, **given)
        cast(Any, made.vision.backbone).pretrained_cfg = facts
        return made

    def prompted(self, module: nn.Module) -> pae.PromptedViT | None:
        return cast(Trained, module).clip.vision

    def pipeline(self, images: Images, training: bool, shown: Shown) -> pixels.Pipeline:
        self._shown = shown
        return super().pipeline(images, training, shown)

    def start(self, module: Any, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        if isinstance(module.clip.pair, DAPT):
            module.prototypes.copy_(module.clip.pair.find_prototypes(module.clip, batches()))

    # ---- a step

    def loss(self, module: Any, outputs: Scores, targets: Tensor) -> Tensor:
        if module.training and module.clip.pair is not None:
            module.clip.pair.see_features(outputs.images, outputs.texts, targets)
        return F.cross_entropy(
            outputs.logits, targets, label_smoothing=self.options.label_smoothing
        )

    def sums(
        self, module: Any, outputs: Any, targets: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        return super().sums(module, outputs.logits, targets, loss)

    # ---- what is measured

    def details(self, sums: Tensor, task: Task) -> dict[str, Any]:
        """Zero-shot, and new classes: one more pass over the test images for each."""
        assert self._module is not None and task.test is not None
        zero = self._accuracy(self._prompted(task.classes, prompts=False), task.test)
        found = {"zero_shot_accuracy": zero}
        if not self.options.base_to_new:
            return found
        if self._unseen is None:  # another of this class has read the data
            self.read()
        assert self._unseen is not None and self._unseen.test is not None
        base = float(sums[1]) / len(task.test)
        other = self._prompted(self._unseen.classes)
        other.load_state_dict(self._module.clip.trained_state(), strict=False)
        new = self._accuracy(other, self._unseen.test)
        zero_new = self._accuracy(
            self._prompted(self._unseen.classes, prompts=False), self._unseen.test
        )
        return {
            **found,
            "new_accuracy": new,
            "harmonic_mean": harmonic(base, new),
            "zero_shot_new_accuracy": zero_new,
            "zero_shot_harmonic_mean": harmonic(zero, zero_new),
        }

    @torch.no_grad()
    def _accuracy(self, model: pae.PromptedCLIP, images: Images) -> float:
        assert self._shown is not None
        model = model.to(self._shown.device).eval()
        data, hits = super().pipeline(images, False, self._shown), 0
        for batch, labels in data.batches(
            pixels.sequential_batches(len(data), self.options.batch_size)
        ):
            logits = model(batch, engine=self.options.engine)
            hits += int((logits.argmax(1) == labels).sum())
        return hits / len(data)


def harmonic(a: float, b: float) -> float:
    """Mean of two accuracies, 0 where one is."""
    return 0.0 if a * b == 0 else 2 * a * b / (a + b)


def readable(folder: str) -> str:
    """A folder's name as words: "tree_frog" and "012.Tree_Frog" are "tree frog" and "Tree Frog";
    "747-400" and "2012 BMW M3" stay as they are.
    """
    name = re.sub(r"^\d+[._-]+(?=[^\W\d_])", "", folder)
    return " ".join(re.split(r"[_\s]+", name)).strip() or folder


def _behind_context(template: str) -> str:
    """What is left of a template where learned rows stand in the place of the words before."""
    return "{}" + template.partition("{}")[2]


def _of_classes(images: Images, classes: range) -> Images:
    """Those of some classes, whose labels begin at 0."""
    chosen = [i for i, label in enumerate(images.labels) if label in classes]
    part = images.subset(chosen)
    return dataclasses.replace(part, labels=[label - classes.start for label in part.labels])
