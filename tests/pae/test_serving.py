"""Many tasks in one batch: the logits of one model per task, image by image."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import pae
from pae.packs import can_pack
from tests import tiny

FAMILIES = {
    "vpt": lambda: pae.prompts.VPTDeep(4),
    "bpt": lambda: pae.prompts.BPTDeep(4, 4),
    "vfpt": lambda: pae.prompts.VFPTDeep(4),
    "pro": lambda: pae.prompts.ProVPT(3),
    "ragged": lambda: pae.prompts.VPTDeep([2, 0, 6]),
    "none": lambda: pae.prompts.VPTDeep(0),
    "da": lambda: tiny.small(pae.prompts.DAVPT),
}


def models(names, feature="plain", dtype=torch.float32, shared=True, **changes):
    """One trained model per name, with 2, 3, ... classes; on one backbone object if `shared`."""
    vit, made = tiny.backbone(feature, dtype, **changes), []
    for number, name in enumerate(names):
        own = vit if shared else tiny.backbone(feature, dtype, **changes)
        torch.manual_seed(number)
        model = pae.PromptedViT(own, FAMILIES[name](), num_classes=2 + number).eval()
        with torch.no_grad():
            for p in (*model.prompts.parameters(), *model.head.parameters()):
                p.copy_(0.7 * torch.randn(p.shape))
        made.append(model)
    return made


@torch.no_grad()
def expected(tasks, images, made):
    most = max(m.num_classes for m in made)
    rows = torch.full((len(images), most), float("-inf"), dtype=images.dtype)
    for row, image, task in zip(rows, images, tasks):
        row[: made[task].num_classes] = made[task](image[None])[0]
    return rows


@pytest.mark.parametrize(
    "feature", ["plain", "registers", "avg", "map", "qk_norm", "swiglu", "inner_norms", "one_block"]
)
def test_equal_to_one_model_per_task(feature):
    names = [n for n in FAMILIES if n != "ragged" or feature != "one_block"]
    names = [n for n in names if feature != "one_block" or n not in ("pro", "da")]
    made = models(names, feature, torch.float64)
    served = pae.serve_many(made)
    generator = torch.Generator().manual_seed(3)
    images = tiny.images(made[0].backbone, 11)
    tasks = torch.randint(len(made), (11,), generator=generator)
    want = expected(tasks.tolist(), images, made)
    got = served(images, tasks)
    assert torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for task in range(len(made)):  # one task alone, and an image's place does not matter
        want = expected([task] * 2, images[:2], made)
        torch.testing.assert_close(served(images[:2], [task] * 2), want, rtol=1e-9, atol=1e-9)


def test_in_fp32_to_a_millionth():
    made = models(["vpt", "bpt", "ragged", "vpt"])
    images, tasks = tiny.images(made[0].backbone, 8), [3, 1, 2, 0, 0, 1, 2, 3]
    got = pae.serve_many(made)(images, tasks)
    for number, (row, task) in enumerate(zip(got, tasks)):
        with torch.no_grad():
            alone = pae.fast_forward(made[task], images[number : number + 1])[0]
        assert tiny.error(row[: len(alone)], alone) < 1e-6


def test_rows_that_fill_up_a_set_are_never_read():
    """In fp64, where nothing hides: as far from the models as those are from themselves."""
    made = models(["ragged", "vpt", "none"], dtype=torch.float64)
    served = pae.serve_many(made)
    images = tiny.images(made[0].backbone, 6)
    tasks = [0, 1, 2, 2, 1, 0]
    got = served(images, tasks)
    torch.testing.assert_close(got, expected(tasks, images, made), rtol=1e-12, atol=1e-12)
    served.rows_2[2].add_(100.0)  # of a task without prompts
    assert torch.equal(served(images, tasks), got)


def test_copies_of_one_backbone_count_as_one_and_others_do_not():
    made = models(["vpt", "bpt"], shared=False)
    images = tiny.images(made[0].backbone, 4)
    got = pae.serve_many(made)(images, [0, 1, 1, 0])
    torch.testing.assert_close(got, expected([0, 1, 1, 0], images, made), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        made[1].backbone.blocks[1].mlp.fc1.weight[0, 0] += 1
    with pytest.raises(ValueError, match="task 1 has another backbone than task 0"):
        pae.serve_many(made)
    vit = tiny.backbone(dtype=torch.float32, act_layer="quick_gelu")
    vit.load_state_dict(
        made[0].backbone.state_dict() | {"head.weight": vit.head.weight, "head.bias": vit.head.bias}
    )
    made[1] = pae.PromptedViT(vit, pae.prompts.VPTDeep(2))
    message = (
        "task 1 has the weights of task 0's backbone with activation quick_gelu, and here it is"
    )
    with pytest.raises(ValueError, match=message):
        pae.serve_many(made)


def test_sets_that_are_loaded_are_read():
    served, others = (pae.serve_many(models(["vpt", "vpt"])) for _ in range(2))
    images, tasks = tiny.images(served.first.backbone, 3), [0, 1, 0]
    before = served(images, tasks)
    for i in range(3):
        getattr(others, f"rows_{i}").add_(torch.randn_like(getattr(others, f"rows_{i}")))
    served.load_state_dict(others.state_dict())
    got = served(images, tasks)
    assert torch.equal(got, others(images, tasks)) and not torch.equal(got, before)
    served.rows_0 = before.new_zeros(served.rows_0.shape)
    assert not torch.equal(served(images, tasks), got)


def test_what_was_learned_is_copied_and_the_backbone_is_watched():
    made = models(["vpt", "vpt"])
    served, images = pae.serve_many(made), tiny.images(made[0].backbone, 2)
    before = served(images, [0, 1])
    with torch.no_grad():
        made[1].prompts.tokens.zero_()
        made[1].head.weight.zero_()
    assert torch.equal(served(images, [0, 1]), before)
    made = models(["vpt", "vpt"])
    served = pae.serve_many(made)
    served(images, [0, 1])
    with torch.no_grad():
        made[0].backbone.blocks[0].norm1.bias.add_(0.5)
    changed = served(images, [0, 1])
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, expected([0, 1], images, made), rtol=1e-5, atol=1e-5)


def test_autocast_and_another_dtype():
    made = models(["vpt", "ragged"])
    served, images = pae.serve_many(made), tiny.images(made[0].backbone, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = served(images, [0, 1, 1, 0])
        want = torch.stack(
            [
                torch.nn.functional.pad(
                    pae.fast_forward(made[t], i[None])[0], (0, 1 - t), value=float("-inf")
                )
                for i, t in zip(images, [0, 1, 1, 0])
            ]
        )
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.06)
    again = copy.deepcopy(served).double()
    exact = expected([0, 1, 1, 0], images.double(), [copy.deepcopy(m).double() for m in made])
    torch.testing.assert_close(again(images.double(), [0, 1, 1, 0]), exact)


def refusals():
    yield "task 1: prompts of VAPT depend on the images", pae.prompts.VAPT, {}
    yield "task 1: prompts of VPTShallow live in the sequence", pae.prompts.VPTShallow, {}
    yield "task 1: prompts of LSPT live in the sequence", pae.prompts.LSPT, {}
    yield "task 1: prompts of IVPT change the image's rows", pae.prompts.IVPT, {}
    yield "task 1: prompts of E2VPT come as keys and values", pae.prompts.E2VPT, {}
    yield "task 1: prompts of APT come as keys and values", pae.prompts.APT, {}
    yield "task 1: cls_token of its backbone was trained", None, {"train_backbone": "cls_token"}


@pytest.mark.parametrize("message, kind, more", list(refusals()))
def test_what_cannot_be_shared_is_named(message, kind, more):
    made = models(["vpt"])
    family = pae.prompts.VPTDeep(4) if kind is None else tiny.small(kind)
    vit = tiny.backbone(dtype=torch.float32)
    made.append(pae.PromptedViT(vit, family, num_classes=3, **more))
    with pytest.raises(ValueError) as caught:
        pae.serve_many(made)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_readouts_heads_and_positions_are_refused():
    vit, plain = tiny.backbone("avg", torch.float32), models(["vpt"], "avg")
    cases = {
        "task 1: pool must be 'image', got 'all'": pae.PromptedViT(
            vit, pae.prompts.VPTDeep(2), num_classes=3, pool="all"
        ),
        "task 1: its head must be nn.Linear, got Sequential": pae.PromptedViT(
            vit, pae.prompts.VPTDeep(2), num_classes=3
        ),
        "task 1 has another backbone than task 0": pae.PromptedViT(
            tiny.backbone("avg", torch.float32), pae.prompts.VPTDeep(2), num_classes=3
        ),
    }
    for number, model in enumerate(cases.values()):
        if number == 1:
            model.head = torch.nn.Sequential(model.head)
        if number == 2:  # the same weights, but for positions: another size of images
            with torch.no_grad():
                model.backbone.pos_embed.add_(0.1)
    for message, model in cases.items():
        with pytest.raises(ValueError) as caught:
            pae.serve_many([*plain, model])
        assert str(caught.value) == message


def test_windows_are_refused():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1),
        num_heads=(2, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match="task 0: its backbone works in windows"):
        pae.serve_many([pae.PromptedViT(swin, pae.prompts.VPTDeep(2), num_classes=3)])


def test_wrong_tasks_are_named():
    made = models(["vpt", "vpt"])
    served, images = pae.serve_many(made), tiny.images(made[0].backbone, 2)
    for tasks, message in (
        ([0], "one per image, 2, got (1,)"),
        ([0, 2], "from 0 to 1, got 0 to 2"),
        ([-1, 0], "from 0 to 1, got -1 to 0"),
        ([0.0, 1.0], "integers, got torch.float32"),
    ):
        with pytest.raises(ValueError) as caught:
            served(images, tasks)
        assert message in str(caught.value)
    for wrong, message in (([], "at least one"), ([made[0], torch.nn.Linear(2, 2)], "task 1 must")):
        with pytest.raises(ValueError, match=message):
            pae.serve_many(wrong)
    assert served(images[:0], []).shape == (0, 3)


def test_checkpoints_share_one_backbone(tmp_path):
    made = models(["vpt", "bpt", "none"])
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for number, (model, file) in enumerate(zip(made, files)):
        names = tuple(f"{number}{c}" for c in range(model.num_classes))
        model.save(file, task=pae.TaskInfo(classes=names))
    vit = tiny.backbone(dtype=torch.float32)
    served = pae.serve_many([*files[:2], str(files[2])], vit)
    assert served.classes[1] == ("10", "11", "12") and served.num_tasks == 3
    assert served.first.backbone is vit
    images = tiny.images(vit, 3)
    want = expected([2, 0, 1], images, made).detach()
    torch.testing.assert_close(served(images, [2, 0, 1]), want, rtol=1e-5, atol=1e-5)


def test_eight_images_at_a_time_on_a_cpu():
    """In fp32 by weights that are laid out once, where MKL has an order of its own; other numbers
    of images as the weights lie, and a copy lays out its own.
    """
    made = models(["vpt", "bpt", "ragged"])
    served, images = pae.serve_many(made), tiny.images(made[0].backbone, 19)
    tasks = (torch.arange(19) * 7 % 3).tolist()
    with torch.no_grad():
        alone = [pae.fast_forward(made[t], images[i : i + 1])[0] for i, t in enumerate(tasks)]
    for count in (3, 8, 19):
        got = served(images[:count], tasks[:count])
        for row, want in zip(got, alone):
            assert tiny.error(row[: len(want)], want) < 2e-6
        steps = served._known[2]
        if can_pack(images):
            laid_out = {len(how._packs) for how in steps[:-1]}
            assert laid_out == ({0} if count == 3 else {4})
            rows = 8 * made[0].view.num_rows(images.shape[-2:])
            assert {how._rows for how in steps[:-1]} == {0 if count == 3 else rows}
    assert served._known[2] is steps  # of one plan, for good
    again = copy.deepcopy(served)
    assert again._known is None
    torch.testing.assert_close(again(images, tasks), got, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # what was laid out is not read where the backbone has changed
        made[0].backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
        changed = served(images[:8], tasks[:8])
    want = expected(tasks[:8], images[:8], made)
    torch.testing.assert_close(changed, want, rtol=1e-4, atol=1e-5)


def test_images_are_not_written_to():
    made = models(["vpt", "bpt"], dtype=torch.float64)
    served, images = pae.serve_many(made), tiny.images(made[0].backbone, 8)
    before = images.clone()
    first = served(images, [0, 1] * 4)
    assert torch.equal(images, before) and torch.equal(served(images, [0, 1] * 4), first)
