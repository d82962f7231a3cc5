"""The tasks of every protocol, by name and alias: classes, splits, groups. Imports nothing heavy.

Sources: VTAB's task_adaptation (labels, splits, groups), NOAH's folders, VPT's names of data sets
and the lists that both publish. The number of classes is a constant of a task: a list that happens
to lack the last class must not shrink the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Task:
    """One task of a protocol.

    Args:
        name: of tables and of results.
        group: what its accuracy is averaged with.
        folder: what it is called on disk in the commonest copy.
        classes: how many there are.
        test: test images, None where sources do not agree.
        aliases: other names that folders and papers have.
        lossless: whether the originals are raw pixels or PNG, so that a JPEG was made of them.
        counts: (train, val) images of the published lists.
        images: folder below the task's that the published lists are relative to.
        tfds: its set in TensorFlow Datasets, with the configuration behind a slash.
        version: of it that VPT ran; others may hold the images in another order.
        cut: which of that set's images are the protocol's; a key of `CUTS`.
    """

    name: str
    group: str
    folder: str
    classes: int
    test: int | None = None
    aliases: tuple[str, ...] = ()
    lossless: bool = False
    counts: tuple[int, int] | None = None
    images: str = ""
    tfds: str = ""
    version: str = ""
    cut: str = ""

    def names(self) -> tuple[str, ...]:
        """All names it goes by."""
        return (self.name, self.folder, *self.aliases)


@dataclass(frozen=True)
class Protocol:
    """A named set of tasks in the order of its tables, in groups."""

    name: str
    title: str
    tasks: tuple[Task, ...]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """{group: names of its tasks}, in order."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            found.setdefault(task.group, []).append(task.name)
        return {group: tuple(names) for group, names in found.items()}

    def find(self, name: str) -> Task:
        """The task that goes by `name`, case, blanks, dashes and a leading "vtab-" apart.

        Raises:
            ValueError: none does; the message lists what there is.
        """
        found = self.lookup(name)
        if found is None:
            known = ", ".join(task.name for task in self.tasks)
            raise ValueError(f"{name}: no task of {self.name}; expected one of {known}")
        return found

    def lookup(self, name: str) -> Task | None:
        """As `find`; None where no task goes by `name`."""
        return self._by_name().get(_plain(name))

    def _by_name(self) -> dict[str, Task]:
        return {_plain(name): task for task in self.tasks for name in task.names()}


def _plain(name: str) -> str:
    text = name.strip().lower().removeprefix("vtab-")
    return re.sub(r"[\s_\-]+", "_", text)


def _vtab(name: str, group: str, folder: str, classes: int, test: int, *aliases: str) -> Task:
    tfds, version, cut = _TFDS[name].split()
    facts = (name, group, folder, classes, test, aliases, name in _LOSSLESS, (800, 200))
    return Task(*facts, tfds=tfds, version=version, cut=cut)


@dataclass(frozen=True)
class Cut:
    """VTAB-1k's images in the order of a set of TensorFlow Datasets: the first 800 of "train", and

    Args:
        val: split that the 200 come from. test: split of the test images.
        val_at: where they begin, in hundredths of that split.
        test_at: where the test images begin: as many hundredths behind, or of a split of their own.
    """

    val: str = "train"
    test: str = "test"
    val_at: int = 0
    test_at: int = 0

    def slices(self, sizes: Mapping[str, int]) -> dict[str, tuple[str, int, int]]:
        """{split: (split of the set, first, behind the last)}, of a set with so many images.

        Raises:
            KeyError: the set lacks a split.
        """
        val = sizes[self.val] * self.val_at // 100
        test = sizes[self.test] * self.test_at // 100
        if self.test == self.val == "train":
            test += val
        return {
            "train": ("train", 0, 800),
            "val": (self.val, val, val + 200),
            "test": (self.test, test, sizes[self.test]),
        }


# Source: VTAB's task_adaptation/data, one file a set
CUTS: Mapping[str, Cut] = {
    "90": Cut(val_at=90),
    "80": Cut(val_at=80),
    "90-validation": Cut(val_at=90, test="validation"),
    "validation": Cut(val="validation"),
    "60-80": Cut(val_at=60, test="train", test_at=20),
    "80-90": Cut(val_at=80, test="train", test_at=10),
    "halves": Cut(val="test", test_at=50),
}
# sets, the versions that VPT ran, cuts
_TFDS = {
    "cifar100": "cifar100 3.0.2 90",
    "caltech101": "caltech101 3.0.1 90",
    "dtd": "dtd 3.0.1 validation",
    "flowers102": "oxford_flowers102 2.1.1 validation",
    "pets": "oxford_iiit_pet 3.2.0 80",
    "svhn": "svhn_cropped 3.0.0 90",
    "sun397": "sun397/tfds 4.0.0 validation",
    "patch_camelyon": "patch_camelyon 2.0.0 validation",
    "eurosat": "eurosat/rgb 2.0.0 60-80",
    "resisc45": "resisc45 3.0.0 60-80",
    "retinopathy": "diabetic_retinopathy_detection/btgraham-300 3.0.0 validation",
    "clevr_count": "clevr 3.1.0 90-validation",
    "clevr_distance": "clevr 3.1.0 90-validation",
    "dmlab": "dmlab 2.0.1 validation",
    "kitti_distance": "kitti 3.2.0 validation",
    "dsprites_location": "dsprites 2.0.0 80-90",
    "dsprites_orientation": "dsprites 2.0.0 80-90",
    "smallnorb_azimuth": "smallnorb 2.0.0 halves",
    "smallnorb_elevation": "smallnorb 2.0.0 halves",
}


# stored without loss where they come from: whatever of them is a JPEG has been encoded once more
_LOSSLESS = {
    *("cifar100", "svhn", "patch_camelyon", "clevr_count", "clevr_distance", "kitti_distance"),
    *("dsprites_location", "dsprites_orientation", "smallnorb_azimuth", "smallnorb_elevation"),
}
_AXIS = "dsprites(predicted_attribute="
VTAB = Protocol(
    "vtab1k",
    "VTAB-1k",
    (
        _vtab("cifar100", "natural", "cifar", 100, 10000, "cifar_100", "cifar(num_classes=100)"),
        _vtab("caltech101", "natural", "caltech101", 102, 6084),
        _vtab("dtd", "natural", "dtd", 47, 1880),
        _vtab("flowers102", "natural", "oxford_flowers102", 102, 6149),
        _vtab("pets", "natural", "oxford_iiit_pet", 37, 3669, "oxford_pet"),
        _vtab("svhn", "natural", "svhn", 10, 26032),
        _vtab("sun397", "natural", "sun397", 397, 21750),
        _vtab("patch_camelyon", "specialized", "patch_camelyon", 2, 32768),
        _vtab("eurosat", "specialized", "eurosat", 10, 5400),
        _vtab("resisc45", "specialized", "resisc45", 45, 6300),
        _vtab(
            "retinopathy",
            "specialized",
            "diabetic_retinopathy",
            5,
            42670,
            'diabetic_retinopathy(config="btgraham-300")',
        ),
        _vtab("clevr_count", "structured", "clevr_count", 8, 15000, 'clevr(task="count_all")'),
        _vtab(
            "clevr_distance",
            "structured",
            "clevr_dist",
            6,
            15000,
            'clevr(task="closest_object_distance")',
        ),
        _vtab("dmlab", "structured", "dmlab", 6, 22735),
        _vtab(
            "kitti_distance",
            "structured",
            "kitti",
            4,
            711,
            "kitti_dist",
            'kitti(task="closest_vehicle_distance")',
        ),
        _vtab(
            "dsprites_location",
            "structured",
            "dsprites_loc",
            16,
            73728,
            f'{_AXIS}"label_x_position",num_classes=16)',
        ),
        _vtab(
            "dsprites_orientation",
            "structured",
            "dsprites_ori",
            16,
            73728,
            f'{_AXIS}"label_orientation",num_classes=16)',
        ),
        _vtab(
            "smallnorb_azimuth",
            "structured",
            "smallnorb_azi",
            18,
            12150,
            'smallnorb(predicted_attribute="label_azimuth")',
        ),
        _vtab(
            "smallnorb_elevation",
            "structured",
            "smallnorb_ele",
            9,
            12150,
            "smallnorb_evaluation",  # what two code bases call it
            'smallnorb(predicted_attribute="label_elevation")',
        ),
    ),
)


FGVC = Protocol(
    "fgvc",
    "FGVC",
    (
        Task(
            *("cub", "fgvc", "CUB", 200, 5794),
            aliases=("CUB_200_2011", "cub200", "CUB200"),
            counts=(5394, 600),
            images="images",
        ),
        Task(*("nabirds", "fgvc", "nabirds", 555, 24633), counts=(21536, 2393), images="images"),
        Task(
            *("flowers", "fgvc", "OxfordFlowers", 102, 6149),
            aliases=("OxfordFlower", "flowers102", "oxford_flowers"),
            counts=(1020, 1020),
        ),
        Task(
            *("dogs", "fgvc", "StanfordDogs", 120, 8580),
            aliases=("stanford_dogs", "Stanford-dogs"),
            counts=(10800, 1200),
            images="Images",
        ),
        Task(
            *("cars", "fgvc", "StanfordCars", 196, 8041),
            aliases=("stanford_cars", "Stanford-cars"),
            counts=(7329, 815),
        ),
    ),
)

SHOTS, DRAWS = (1, 2, 4, 8, 16), (0, 1, 2)
FEW_SHOT = Protocol(
    "few-shot",
    "few-shot (five fine-grained sets)",
    (
        Task(
            *("food101", "few-shot", "food101", 101, 30300),
            aliases=("food-101",),
            images="images",
        ),
        Task(
            *("pets", "few-shot", "oxford-pets", 37, 3669),
            aliases=("oxford_pets",),
            images="images",
        ),
        Task(
            *("cars", "few-shot", "standford-cars", 196, 8041),  # so are the published lists called
            aliases=("stanford-cars", "stanford_cars"),
        ),
        Task(
            *("flowers", "few-shot", "oxford-flowers102", 102, 2463),
            aliases=("oxford-flowers", "oxford_flowers", "flowers102"),
            images="images",
        ),
        Task(
            *("aircraft", "few-shot", "fgvc-aircraft", 100, 3333),
            aliases=("fgvc_aircraft",),
            images="images",
        ),
    ),
)

# what package managers deliver; see `pae.train.embedded`
SMALL = Protocol(
    "small-vtab",
    "small VTAB",
    (
        Task("traffic-lights", "natural", "traffic-lights", 3),
        Task("fashion-mnist", "natural", "fashion-mnist", 10),
        Task("digits", "natural", "digits", 10),
        Task("pneumonia", "specialized", "pneumonia", 2),
        Task("elpv-defect", "specialized", "elpv-defect", 4),
        Task("shapes-count", "structured", "shapes-count", 6),
        Task("shapes-angle", "structured", "shapes-angle", 8),
    ),
)

NAMES = ("vtab1k", "fgvc", "few-shot")  # that papers have
PROTOCOLS: Mapping[str, Protocol] = {p.name: p for p in (VTAB, FGVC, FEW_SHOT, SMALL)}


def few_shot(names: Iterable[str]) -> Protocol | None:
    """The five sets at the shots that `names` ("pets-4shot", ...) have, a group for each number;
    None where a name is another.
    """
    found = [re.fullmatch(r"(.+)-(\d+)shot", name) for name in names]
    known = {task.name for task in FEW_SHOT.tasks}
    if not found or any(match is None or match[1] not in known for match in found):
        return None
    shots = sorted({int(match[2]) for match in found if match})
    tasks = [
        replace(task, name=f"{task.name}-{k}shot", group=f"{k} shots")
        for k in shots
        for task in FEW_SHOT.tasks
    ]
    return replace(FEW_SHOT, tasks=tuple(tasks))


def protocol_of(names: Iterable[str]) -> Protocol | None:
    """The protocol that has tasks of all these names; None where none or several have."""
    wanted = set(names)
    found = [p for p in PROTOCOLS.values() if wanted <= {task.name for task in p.tasks}]
    return found[0] if len(found) == 1 else None
