"""Class-incremental learning: tasks of disjoint classes one after another, as NSP2 is used.

Source: Lu et al., "Visual Prompt Tuning in Null Space for Continual Learning" (NeurIPS 2024, arXiv
2406.05658); what its text leaves open follows the released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import PromptedViT, fast_forward
from .nsp2 import NullSpace

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ClassTask:
    """Some classes, and their images: (images, labels) per batch, gone through once per epoch.

    Labels are those of the whole problem, indices of `model.head`'s outputs.
    """

    classes: Sequence[int]
    train: Batches
    test: Batches


@dataclass
class ContinualResult:
    """Row t of `accuracy`: after task t, on the test images of tasks 0 to t, among all classes so
    far.
    """

    accuracy: list[list[float]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # in the test set of each task

    @property
    def last(self) -> float:
        """Accuracy over the test images of all tasks, after the last one."""
        right = sum(a * n for a, n in zip(self.accuracy[-1], self.images))
        return right / sum(self.images)

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy that it ever had minus the last."""
        tasks = range(len(self.accuracy) - 1)
        falls = [max(row[s] for row in self.accuracy[s:]) - self.accuracy[-1][s] for s in tasks]
        return sum(falls) / len(falls) if falls else 0.0


def learn_tasks(
    model: PromptedViT,
    tasks: Sequence[ClassTask],
    space: NullSpace | None = None,
    *,
    epochs: int = 10,
    lr: float = 0.01,
    weight_decay: float = 5e-5,
    milestones: Sequence[int] = (5, 8),
    temperature: float = 28.0,
) -> ContinualResult:
    """Train the prompts on one task after another, each with a head of its own.

    The head of a task is trained with it and never again; at test time all heads so far stand side
    by side, and the task of an image is not known. Logits are divided by `temperature` in training.
    Adam; the rate is divided by 10 at the beginning of each epoch of `milestones`, counted from 0.

    Args:
        model: its head is linear, with an output for every class of every task; its rows are where
            the heads start and where they end. Any prompt family.
        tasks: at least one; no class in two of them.
        space: over `model`; updates of the prompts are projected, their drift is penalised, and
            each finished task is observed. None tunes in sequence, with nothing against forgetting.
        epochs, lr, weight_decay, milestones, temperature: of every task; the defaults are the
            published ones (which go through the data ten times an epoch, in batches of 256).

    Returns:
        accuracies after every task.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    if not isinstance(model, PromptedViT):
        raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
    joint = model.head
    if not isinstance(joint, nn.Linear):
        raise TypeError(f"model.head must be nn.Linear, got {type(joint).__name__}")
    if space is not None and space.model is not model:
        raise ValueError("space must be over the same model")
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    _check_classes(tasks, joint.out_features)

    result = ContinualResult()
    seen: list[int] = []
    for task in tasks:
        seen += task.classes
        head = _part_of(joint, task.classes)
        model.head = head
        try:
            model.train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
            if space is not None:
                space.project(optimizer)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones))
            for _ in range(epochs):
                _epoch(model, task, optimizer, space, temperature)
                schedule.step()
        finally:
            model.head = joint
        with torch.no_grad():
            joint.weight[task.classes], joint.bias[task.classes] = head.weight, head.bias
        if space is not None:
            space.observe(images.to(model.device) for images, _ in task.train)
        rows = [_right(model, old.test, seen) for old in tasks[: len(result.accuracy) + 1]]
        result.images = [count for _, count in rows]
        result.accuracy.append([right / count for right, count in rows])
    return result


def _check_classes(tasks: Sequence[ClassTask], outputs: int) -> None:
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none")
    owner: dict[int, int] = {}
    for number, task in enumerate(tasks):
        if not task.classes:
            raise ValueError(f"tasks[{number}].classes must hold at least one class, got none")
        for label in task.classes:
            if not 0 <= label < outputs:
                raise ValueError(
                    f"tasks[{number}].classes must be outputs of model.head, 0 to {outputs - 1}, "
                    f"got {label}"
                )
            if label in owner:
                raise ValueError(
                    f"tasks[{number}].classes: class {label} is in tasks[{owner[label]}] already"
                )
            owner[label] = number


def _part_of(joint: nn.Linear, classes: Sequence[int]) -> nn.Linear:
    head = nn.Linear(joint.in_features, len(classes)).to(joint.weight)
    with torch.no_grad():
        head.weight.copy_(joint.weight[classes])
        head.bias.copy_(joint.bias[classes])
    return head


def _epoch(
    model: PromptedViT,
    task: ClassTask,
    optimizer: torch.optim.Optimizer,
    space: NullSpace | None,
    temperature: float,
) -> None:
    place = {label: i for i, label in enumerate(task.classes)}
    batches = 0
    for images, labels in task.train:
        strangers = sorted(set(labels.tolist()) - set(place))
        if strangers:
            raise ValueError(
                f"train images must be of the task's classes {list(task.classes)}, got one of "
                f"class {strangers[0]}"
            )
        if len(labels) == 0:
            raise ValueError("train batches must hold at least one image, got none")
        local = torch.tensor([place[label] for label in labels.tolist()], device=model.device)
        loss = F.cross_entropy(fast_forward(model, images.to(model.device)) / temperature, local)
        loss = loss + model.penalty()
        if space is not None:
            loss = loss + space.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batches += 1
    if batches == 0:
        raise ValueError("train must hold at least one batch, got none (an iterator can be gone "
                         "through only once)")  # fmt: skip


@torch.no_grad()
def _right(model: PromptedViT, test: Batches, seen: Sequence[int]) -> tuple[int, int]:
    """How many test images are told right among the classes `seen`, and how many there are."""
    training = model.training
    model.eval()
    among = torch.tensor(sorted(seen))
    right = count = 0
    for images, labels in test:
        logits = fast_forward(model, images.to(model.device)).cpu()[:, among]
        right += int((among[logits.argmax(1)] == labels.cpu()).sum())
        count += len(labels)
    model.train(training)
    if count == 0:
        raise ValueError("test must hold at least one image, got none")
    return right, count
