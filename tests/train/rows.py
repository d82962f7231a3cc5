"""Image sets that are no folders of files, as their own libraries write them."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
from PIL import Image

from pae.train import images


def encoded(seed=0, size=(9, 7), format="PNG", mode="RGB"):
    """The bytes of a small image file."""
    rng, out = np.random.default_rng(seed), io.BytesIO()
    pixels = rng.integers(0, 256, (*size, 3) if mode == "RGB" else size, np.uint8)
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def pixels(item):
    return np.asarray(images.decode(item, images.Ranges()))


def shades(count, level):
    """`count` encoded images of a shade, different from one another."""
    out = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (level, i % 200, level)).save(file, "PNG")
        out.append(file.getvalue())
    return out


def example(**features):
    """A serialised ``tf.train.Example``, by protobuf's own encoder."""
    message = _example_class()()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = message.features.feature[name.replace("__", "/")]
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(feature, kind).value.extend(values)
    return message.SerializeToString()


def _example_class():
    """tensorflow/core/example/feature.proto and example.proto, as a description."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    of = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields, within=file.message_type):
        made = within.add(name=name)
        for number, (field, kind, label, type_name) in enumerate(fields, 1):
            made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name)
        return made

    many, one = of.LABEL_REPEATED, of.LABEL_OPTIONAL
    kinds = {"Bytes": of.TYPE_BYTES, "Float": of.TYPE_FLOAT, "Int64": of.TYPE_INT64}
    for name, kind in kinds.items():
        message(f"{name}List", ("value", kind, many, None))
    lists = [(f"{n.lower()}_list", of.TYPE_MESSAGE, one, f".t.{n}List") for n in kinds]
    message("Feature", *lists)
    features = message("Features", ("feature", of.TYPE_MESSAGE, many, ".t.Features.FeatureEntry"))
    entry = message(
        "FeatureEntry",
        ("key", of.TYPE_STRING, one, None),
        ("value", of.TYPE_MESSAGE, one, ".t.Feature"),
        within=features.nested_type,
    )
    entry.options.map_entry = True
    message("Example", ("features", of.TYPE_MESSAGE, one, ".t.Features"))
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def crc32c(data):
    """Bit by bit, as its polynomial says (Castagnoli, reflected)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def framed(*records):
    """A TFRecord file."""
    out = b""
    for data in records:
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            out += part + struct.pack("<I", masked)
    return out


IMAGE = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image", "image": {}}


def of_classes(count):
    kind = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    return {"pythonClassName": kind, "classLabel": {"numClasses": str(count)}}


def write_tfds(folder, splits, features, names=None, shards=1, **info):
    """A folder as tensorflow-datasets leaves it: `splits` are {name: serialised examples}."""
    folder.mkdir(parents=True)
    name = info.setdefault("name", folder.parent.name)
    described = []
    for split, records in splits.items():
        parts = [
            records[len(records) * i // shards : len(records) * (i + 1) // shards]
            for i in range(shards)
        ]
        for i, part in enumerate(parts):
            file = f"{name}-{split}.tfrecord-{i:05d}-of-{shards:05d}"
            (folder / file).write_bytes(framed(*part))
        described.append(
            {
                "name": split,
                "shardLengths": [str(len(part)) for part in parts],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"fileFormat": "tfrecord", "splits": described, "version": folder.name, **info}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    table = {"pythonClassName": kind, "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(table))
    for feature, own in (names or {}).items():
        (folder / f"{feature}.labels.txt").write_text("".join(f"{n}\n" for n in own))
    return folder
