"""Tasks one after another: which rows learn, how accuracy is counted, that forgetting is less."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pae
from pae.methods.continual import ClassTask, ContinualResult, learn_tasks
from pae.methods.nsp2 import NullSpace
from tests import tiny
from tests.tiny import error


def problem(count=2, per_class=4, seed=0):
    """A model of 2 classes a task, and tasks whose images tell their class by a pattern."""
    torch.manual_seed(seed)
    model = pae.PromptedViT(tiny.backbone(), pae.prompts.VPTDeep(4), num_classes=2 * count)
    model.double()
    draw = torch.Generator().manual_seed(seed)
    shape = tiny.images(model.backbone, 1).shape[1:]
    tasks = []
    for t in range(count):
        classes = [2 * t + 1, 2 * t]
        labels = torch.tensor(classes).repeat(per_class)
        patterns = torch.randn(2 * count, *shape, generator=draw, dtype=torch.float64)
        noise = torch.randn(len(labels), *shape, generator=draw, dtype=torch.float64)
        images = patterns[labels] + 0.3 * noise
        batches = list(zip(images.split(per_class), labels.split(per_class)))
        tasks.append(ClassTask(classes, batches, batches))
    return model, tasks


def test_one_task_by_hand():
    """Two steps of Adam on cross-entropy over the task's two outputs, divided by 28."""
    model, (task, _) = problem()
    twin = copy.deepcopy(model)
    result = learn_tasks(model, [task], epochs=2, milestones=(1,))
    head = torch.nn.Linear(twin.head.in_features, 2).double()
    with torch.no_grad():
        head.weight.copy_(twin.head.weight[[1, 0]])
        head.bias.copy_(twin.head.bias[[1, 0]])
    joint, twin.head = twin.head, head
    optimizer = torch.optim.Adam(
        [*twin.prompts.parameters(), *head.parameters()], lr=0.01, weight_decay=5e-5
    )
    twin.train()
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.1**epoch
        for images, labels in task.train:
            optimizer.zero_grad()
            F.cross_entropy(twin(images) / 28, 1 - labels).backward()
            optimizer.step()
    assert error(model.prompts.tokens, twin.prompts.tokens) < 1e-9
    assert error(model.head.weight[[1, 0]], head.weight) < 1e-9
    assert torch.equal(model.head.weight[2:], joint.weight[2:])  # no output of another task moves
    assert torch.equal(model.head.bias[2:], joint.bias[2:])
    images, labels = (torch.cat(parts) for parts in zip(*task.test))
    found = (model.eval()(images)[:, :2].argmax(1) == labels).double().mean()
    assert result.accuracy == [[found.item()]] and result.last == found and result.forgetting == 0


def test_old_heads_stay_and_all_compete():
    model, tasks = problem(3)
    heads = []

    class Watched(NullSpace):
        def observe(self, batches):
            heads.append(model.head.weight.detach().clone())
            super().observe(batches)

    result = learn_tasks(model, tasks, Watched(model), epochs=1)
    assert torch.equal(heads[1][:2], heads[0][:2]) and torch.equal(heads[2][:4], heads[1][:4])
    assert [len(row) for row in result.accuracy] == [1, 2, 3] and result.images == [8, 8, 8]
    images, labels = tasks[0].test[0]
    assert (model.eval()(images).argmax(1) == labels).sum() <= result.accuracy[2][0] * 8
    assert isinstance(model.head, torch.nn.Linear) and model.head.out_features == 6


def test_a_space_projects_penalises_and_observes():
    model, tasks = problem()
    space = NullSpace(model, 1.0)
    learn_tasks(model, tasks[:1], space, epochs=1)
    assert space.tasks == 1
    before, sums = model.prompts.tokens.detach().clone(), space.C1.clone()
    pi1, pi2 = (p.clone() for p in space.projections())
    learn_tasks(model, tasks[1:], space, epochs=2)
    moved = (model.prompts.tokens.detach() - before).double()
    assert space.tasks == 2 and moved.norm() > 0
    assert error(pi2 @ moved @ pi1, moved) < 1e-9  # inside the null space
    assert not torch.equal(space.C1, sums)
    free, _ = problem()
    learn_tasks(free, tasks, epochs=2)
    assert not torch.allclose(free.prompts.tokens, model.prompts.tokens)


def test_figures_of_a_sequence():
    result = ContinualResult([[1.0], [0.5, 0.8], [0.6, 0.4, 1.0]], [10, 10, 20])
    assert result.last == pytest.approx((6 + 4 + 20) / 40)
    assert result.forgetting == pytest.approx(((1 - 0.6) + (0.8 - 0.4)) / 2)


def refused(message, *arguments, kind=ValueError, **options):
    with pytest.raises(kind, match=message) as caught:
        learn_tasks(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    model, (task, other) = problem()
    refused("model must be a PromptedViT", model.backbone, [task], kind=TypeError)
    refused("tasks must hold at least one", model, [])
    refused(r"class 1 is in tasks\[0\] already", model, [task, task])
    refused("0 to 3, got 4", model, [ClassTask([4], task.train, task.test)])
    refused("at least one class", model, [ClassTask([], task.train, task.test)])
    refused(r"classes \[1, 0\], got one of class 2", model, [ClassTask([1, 0], other.train, [])])
    empty = [(task.train[0][0][:0], task.train[0][1][:0])]
    refused("batches must hold at least one image", model, [ClassTask([1, 0], empty, task.test)])
    refused("at least one batch", model, [ClassTask([1, 0], iter([]), task.test)])
    refused("at least one image", model, [ClassTask([1, 0], task.train, [])])
    refused("epochs must be", model, [task], epochs=0)
    refused("temperature must be above 0", model, [task], temperature=0)
    refused("space must be over the same model", model, [task], NullSpace(problem()[0]))
    before = model.head
    refused("of class 2", model, [ClassTask([1, 0], other.train, task.test)])
    assert model.head is before
    model.head = torch.nn.Identity()
    refused("model.head must be nn.Linear", model, [task], kind=TypeError)
