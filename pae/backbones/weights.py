"""Weights of a timm model out of other people's files: every tensor accounted for, or refused.

timm loads what fits and is silent about the rest once the head differs. Here every tensor of the
backbone comes from the file, whatever else the file holds is known for what it is, and one line
says from where the weights were taken.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..foreign import as_tensor, first_line, listed, read_weights_file

_MOST = 4  # names in a message
# Keys under which files keep state dicts, those to be preferred first: averages of the weights,
# which their authors evaluate, before the weights that were being trained.
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params"),
    *("weights", "module", "backbone", "encoder", "base_encoder", "target_encoder", "student"),
)
# What stands in front of the names of the backbone, in any combination.
_PREFIX_PARTS = {
    *("module", "model", "backbone", "encoder", "base_encoder", "momentum_encoder", "teacher"),
    *("student", "teacher_backbone", "student_backbone", "visual", "trunk", "visual_encoder"),
    *("image_encoder", "vision_encoder", "vision_model", "vision_tower", "net", "network", "vit"),
    *("deit", "dinov2", "dino", "ema_model", "online_model", "online_encoder", "target_encoder"),
    *("encoder_q", "encoder_k", "feature_extractor", "base_model", "transformer", "enc", "ema"),
    *("momentum_backbone", "backbone_momentum", "visual_encoder_m", "timm_model", "model_ema"),
    *("teacher_model", "student_model"),
}
# Of two copies of the network in one file, the one that is not taken.
_SECOND = {
    *("student", "student_backbone", "momentum_encoder", "online_model", "target_encoder"),
    *("encoder_k", "momentum_backbone", "backbone_momentum", "visual_encoder_m", "student_model"),
}
# What wrappers of modules put between the parts of a name.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Heads, projectors, decoders, text towers and what losses and averages keep: no part of a backbone.
_BESIDE_BACKBONE = re.compile(
    r"((\w+_)?(head|heads|proj|projectors?|predictors?|loss|acc|queue)|head_dist|attn_pool|fc"
    r"|classifier|\w+_classifier|pre_logits|pooler|projection\w*|prototypes?|decoder\w*|mask_token"
    r"|masked_embed|text\w*|token_embedding|positional_embedding|ln_final|logit_scale|logit_bias"
    r"|attn_mask|visual_projection|transformer|embeddings\.position_ids|queue\w*|center|n_averaged"
    r"|initted|step|criterion|loss\w*|metrics?|\w+_acc\w*|temp)(\.|$)"
)
# The norm in front of the readout, or behind its mean; not one inside a block.
_FINAL_NORM = re.compile(r"^(?!.*blocks\.)(?:.*\.)?(norm|fc_norm)\.weight$")
# And buffers of whole numbers.
_NO_WEIGHT = re.compile(
    rf"{_BESIDE_BACKBONE.pattern}"
    r"|(.+\.)?(relative_position_index|attn_mask|num_batches_tracked|position_ids)$"
)


@dataclass(frozen=True)
class LoadedWeights:
    """From where `load_weights` took the weights, and what it left in the file.

    Attributes:
        source: the file, or what the mapping was called.
        count: tensors of the backbone, every one of them from `source`.
        container: keys under which their names stood, outermost first, with dots; "" for none.
        prefix: what stood in front of their names.
        layout: whose names they were: "timm", "Hugging Face", "JAX", ...
        remarks: what a reader has to know, e.g. that the position embedding was resampled.
        unread: {what: count} of the rest of the file, e.g. {"of heads and training": 4}.
    """

    source: str
    count: int
    container: str = ""
    prefix: str = ""
    layout: str = "timm"
    remarks: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"all {self.count} tensors of the backbone"]
        if self.container:
            said[0] += f" from {self.container!r}"
        if self.prefix:
            said[0] += f" without the prefix {self.prefix!r}"
        if self.layout != "timm":
            said.append(f"names of {self.layout}")
        said += self.remarks
        if self.unread:
            rest = ", ".join(f"{count} {what}" for what, count in self.unread.items())
            said.append(f"not read: {rest}")
        return f"weights {self.source}: {'; '.join(said)}"


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], name: str | None = None
) -> LoadedWeights:
    """Fill a timm model from a file, its head excepted: all of it, or nothing.

    State dicts are found under the usual keys (``state_dict``, ``model``, ``teacher``, ...; of
    several, an average of the weights is preferred: ``model_ema`` to ``model``, ``teacher`` to
    ``student``) and behind the usual prefixes (``module.``, ``base_encoder.``, ``backbone.``, ...,
    in any combination). Names of Hugging Face's ViT, DINOv2 and CLIP and of VPT's code are
    translated here; for others (JAX archives, OpenAI's and OpenCLIP's names, DINOv2, BEiT-3, ...)
    timm's own converters are asked.

    Args:
        model: on any device; on the meta device names and shapes are checked and nothing is filled.
        source: a .safetensors, .npz or torch file, or what was read from one. No code in it is run.
        name: what to call `source` in messages; its path by default.

    Returns:
        `LoadedWeights`; its text is one line for the user.

    Raises:
        CheckpointError: the file cannot be read; tensors of the backbone are missing from it, have
            another shape or type, or are not finite; it holds tensors that are neither the
            backbone's nor of the known kinds beside one. One line, with the first few names.
    """
    values = not any(parameter.is_meta for parameter in model.parameters())
    if isinstance(source, Mapping):
        content, name = source, name or "given"
    else:
        name = name or str(source)
        found = read_weights_file(source, values)
        if found is None:
            return LoadedWeights(name, 0)
        content = found
    for prefix in _JAX_PREFIXES:
        if f"{prefix}embedding/kernel" in content:
            return _load_jax(model, source, content, name, prefix)
    return _load_tables(model, content, name, values)


def has_norm_of_a_mean(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a file's backbone has a norm behind a mean of its rows and none before it, as a model
    has that was fine-tuned with average pooling (MAE's): known by names, values are not read.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        content: Mapping[str, Any] | None = source
    else:  # some formats have no names without values
        content = read_weights_file(source, values=False) or read_weights_file(source)
    names = [name for _, table, _ in tables_of(content or {}, "") for name in table]
    ends = {match[1] for name in names if (match := _FINAL_NORM.search(name))}
    return ends == {"fc_norm"}


# ---- state dicts


@dataclass
class _Candidate:
    """One way to read the file: a state dict in it, and a prefix before the backbone's names.

    Attributes:
        path: keys to the state dict.
        inside, outside: its tensors with the prefix, which is cut off; and the others.
        state: `inside` under timm's names; as far as it came if there is an `error`.
        layout: whose names `inside` has.
        shapes: of `state` before timm's converter.
        error: why it cannot be put under timm's names.
    """

    path: tuple[str, ...]
    prefix: str
    inside: dict[str, Tensor]
    outside: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    layout: str = "timm"
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    error: str | None = None

    def rank(self) -> tuple[int, int, int]:
        """Its place among the ways to read the file; a longer prefix before its beginnings."""
        place = _CONTAINERS.index(self.path[-1]) if self.path else -1
        parts = self.prefix.split(".")
        return place, sum(part in _SECOND for part in parts), -len(parts)


def _load_tables(
    model: nn.Module, content: Mapping[str, Any], name: str, values: bool
) -> LoadedWeights:
    own = model.state_dict()
    head = _head_names(model)
    needed = [key for key in own if not key.startswith(head)]
    candidates, others = [], 0
    for path, table, strange in tables_of(content, name):
        others += strange
        candidates += [
            _candidate(model, path, table, prefix, values) for prefix in _prefixes(table)
        ]
    if not candidates:
        raise CheckpointError(
            f"weights {name}: expected a state dict, it holds {listed(content, _MOST) or 'nothing'}"
        )

    def covered(candidate: _Candidate) -> int:
        return sum(key in candidate.state for key in needed)

    candidates.sort(key=_Candidate.rank)
    likely = [each for each in candidates if 2 * covered(each) >= len(needed)]
    failed = [each for each in candidates if each.error is not None]
    chosen = (likely or failed or [max(candidates, key=covered)])[0]
    if chosen.error is not None:
        raise CheckpointError(f"weights {name} do not fit {_called(model)}: {chosen.error}")
    unread, unknown = _unread(chosen, own, head)
    given = {k: v for k, v in chosen.inside.items() if not _NO_WEIGHT.match(k)}
    _refuse_misfits(model, name, own, needed, chosen.state, given, unknown)
    if chosen.path:
        others += sum(key != chosen.path[0] for key in content)
    if others:
        unread["other entries"] = others
    if values:
        _fill(name, own, {key: chosen.state[key] for key in needed})
    where, remarks = ".".join(chosen.path), _remarks(model, chosen)
    return LoadedWeights(name, len(needed), where, chosen.prefix, chosen.layout, remarks, unread)


def tables_of(
    content: Mapping[str, Any], name: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor], int]]:
    """(keys to it, {name: tensor}, number of its other entries) of every state dict of a file."""
    table: dict[str, Tensor] = {}
    others = 0
    for key, value in content.items():
        tensor = as_tensor(value)
        if isinstance(value, Mapping):
            if key in _CONTAINERS and len(path) < 4:
                yield from tables_of(value, name, (*path, key))
        elif tensor is not None and isinstance(key, str):
            plain = _WRAPPERS.sub("", key)
            if plain in table:
                raise CheckpointError(
                    f"weights {name}: {plain} is there twice, once inside a wrapper"
                )
            table[plain] = tensor
        elif path:
            others += 1
    if table:
        yield path, table, others


def _prefixes(table: Iterable[str]) -> list[str]:
    """Every combination of known parts that names of the table begin with, and none."""
    found = {""}
    for name in table:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in _PREFIX_PARTS:
                break
            prefix += part + "."
            found.add(prefix)
    return sorted(found)


def _candidate(
    model: nn.Module, path: tuple[str, ...], table: dict[str, Tensor], prefix: str, values: bool
) -> _Candidate:
    inside = {k.removeprefix(prefix): v for k, v in table.items() if k.startswith(prefix)}
    outside = {k: v for k, v in table.items() if not k.startswith(prefix)}
    candidate = _Candidate(path, prefix, inside, outside)
    # names and shapes alone are asked for: nothing is to be read, which the meta device ensures
    state = inside if values else {key: value.to("meta") for key, value in inside.items()}
    try:
        if translated := _translated(state):
            candidate.layout, state = translated
    except RuntimeError as error:  # parts of a stack that have different shapes
        candidate.error = f"query, key and value do not go together ({first_line(error)})"
        return candidate
    candidate.shapes = {key: value.shape for key, value in state.items()}
    candidate.state = state
    candidate.error = _other_patches(model, state)
    convert = _timm_converter(model)
    if candidate.error or convert is None:
        return candidate
    try:
        candidate.state = convert(state)
    except Exception as error:  # timm's converters raise whatever their parts raise
        candidate.error = f"timm's converter refuses them ({first_line(error)})"
    else:
        if not state.keys() & candidate.state.keys():
            candidate.layout = "a kind that timm converts"
    return candidate


def _timm_converter(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """timm's `checkpoint_filter_fn` beside the class of the model, with what timm gives it."""
    for kind in type(model).__mro__:
        function = getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
        if function is not None:
            taken = inspect.signature(function).parameters
            options: dict[str, Any] = {}
            if "adapt_layer_scale" in taken:  # a renaming; timm asks for it with DeiT III alone
                options["adapt_layer_scale"] = True
            if "antialias" in taken and "flexi" in _called(model):
                options |= {"interpolation": "bilinear", "antialias": False}
            return lambda state: function(dict(state), model, **options)
    return None


def _other_patches(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a patch embedding that timm would resample to patches of another size."""
    own = getattr(getattr(model, "patch_embed", None), "proj", None)
    if isinstance(own, nn.Conv2d):
        for key in ("patch_embed.proj.weight", "visual.conv1.weight"):
            found = state.get(key)
            if found is not None and found.dim() == 4 and found.shape[2:] != own.weight.shape[2:]:
                return f"{_misshapen(key, found, own.weight)}, patches of another size"
    return None


def _unread(
    chosen: _Candidate, own: Mapping[str, Tensor], head: tuple[str, ...]
) -> tuple[dict[str, int], list[str]]:
    """Counts of what is left unread, by kind, and the names that nothing explains."""
    beside, copies = "of heads, decoders and training", "of other copies"
    counts = {beside: 0, copies: 0}
    unknown = []
    for key in chosen.state:
        if key.startswith(head) or (key not in own and _BESIDE_BACKBONE.match(key)):
            counts[beside] += 1
        elif key not in own:
            unknown.append(chosen.prefix + key)
    for key in chosen.outside:
        plain = key
        while plain.partition(".")[0] in _PREFIX_PARTS and plain not in chosen.inside:
            plain = plain.partition(".")[2]
        if plain in chosen.inside or plain in own:
            counts[copies] += 1
        elif _BESIDE_BACKBONE.match(key) or _BESIDE_BACKBONE.match(plain):
            counts[beside] += 1
        else:
            unknown.append(key)
    return {what: count for what, count in counts.items() if count}, unknown


def _refuse_misfits(
    model: nn.Module,
    name: str,
    own: Mapping[str, Tensor],
    needed: list[str],
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    unknown: list[str],
) -> None:
    """Raise with the names that are missing, unknown or not as the model has them.

    `given` is what `state` was made of: a stack of three tensors shows the type of none of them.
    """
    both = [key for key in needed if key in state]
    problems = (
        ("missing", [key for key in needed if key not in state]),
        ("unknown", unknown),
        (
            "wrong shape",
            [_misshapen(k, state[k], own[k]) for k in both if state[k].shape != own[k].shape],
        ),
        ("wrong type", [f"{k} is {v.dtype}" for k, v in given.items() if not _fits(v, own.get(k))]),
    )
    of = {"missing": f" of {len(needed)}"}
    said = [
        f"{what} {len(keys)}{of.get(what, '')}: {listed(keys, _MOST)}"
        for what, keys in problems
        if keys
    ]
    if said:
        missing = problems[0][1]
        renamed = 2 * len(missing) > len(needed) and unknown
        advice = "give them timm's names" if renamed else "take the timm model that they are of"
        if renamed and any("prompt" in key.lower() for key in unknown):
            advice = "trained prompts are no backbone: PromptedViT.load or load_official reads them"
        if missing == ["norm.weight", "norm.bias"] and any("fc_norm" in key for key in unknown):
            advice = (
                "it was fine-tuned with a mean of rows: pae.backbones.average_pooled(model) reads "
                "one, and pae train with --pool image, all or prompts"
            )
        raise CheckpointError(
            f"weights {name} do not fit {_called(model)}: {'; '.join(said)}; {advice}"
        )


def _remarks(model: nn.Module, chosen: _Candidate) -> list[str]:
    """What was changed on the way into the model, or cannot be known from the file."""
    remarks = []
    shapes = chosen.shapes
    own = getattr(model, "pos_embed", None)
    given = shapes.get("pos_embed", shapes.get("visual.positional_embedding"))
    if given is not None and isinstance(own, Tensor):
        # beside registers timm adds the class token's position to the class token
        rows = given[-2] - ("register_tokens" in shapes)
        if rows != own.shape[-2]:
            remarks.append(f"pos_embed resampled from {rows} to {own.shape[-2]} positions")
    resized = [
        f"{key} from {tuple(shapes[key])} to {tuple(tensor.shape)}"
        for key, tensor in chosen.state.items()
        if key != "pos_embed" and key in shapes and shapes[key].numel() != tensor.numel()
    ]
    if resized:
        remarks.append(f"resampled {listed(resized, 1)}")
    if chosen.inside.keys() & {"visual.class_embedding", "embeddings.class_embedding"}:
        has = "has it" if "quickgelu" in _called(model) else "has not"
        remarks.append(f"CLIP of OpenAI has QuickGELU, which no file tells; {_called(model)} {has}")
    return remarks


def _fill(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies the tensors into the model once all of them are known to be finite in its type."""
    cast = {key: value.to(own[key].dtype) for key, value in state.items()}
    bad = [k for k, value in cast.items() if value.is_meta or not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"weights {name}: NaN or infinite values in {listed(bad, _MOST)}")
    with torch.no_grad():
        for key, value in cast.items():
            own[key].copy_(value)


# ---- names that are not timm's, and for which timm has no converter


_LAYER = r"encoder\.layers?\.(\d+)\."
_RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
        (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
        (r"embeddings\.(mask_token|register_tokens)", r"\1"),
        (
            r"embeddings\.(?:patch_embeddings(?:\.projection)?|patch_embedding)\.(weight|bias)",
            r"patch_embed.proj.\1",
        ),
        (r"pre_layrnorm\.(\w+)", r"norm_pre.\1"),
        (_LAYER + r"(?:layernorm_before|layer_norm1|attention_norm|norm1)\.(\w+)", r"norm1.\2"),
        (_LAYER + r"(?:layernorm_after|layer_norm2|ffn_norm|norm2)\.(\w+)", r"norm2.\2"),
        (
            _LAYER + r"(?:attention\.output\.dense|self_attn\.out_proj|attn\.out)\.(\w+)",
            r"attn.proj.\2",
        ),
        (_LAYER + r"(?:intermediate\.dense|mlp\.fc1|ffn\.fc1)\.(\w+)", r"mlp.fc1.\2"),
        (_LAYER + r"(?:output\.dense|mlp\.fc2|ffn\.fc2)\.(\w+)", r"mlp.fc2.\2"),
        (_LAYER + r"mlp\.weights_in\.(\w+)", r"mlp.w12.\2"),
        (_LAYER + r"mlp\.weights_out\.(\w+)", r"mlp.w3.\2"),
        (_LAYER + r"layer_scale(\d)\.lambda1", r"ls\2.gamma"),
        (r"(?:layernorm|post_layernorm|encoder\.encoder_norm)\.(\w+)", r"norm.\1"),
    )
)
# DINOv2's training code keeps blocks in groups, which it wraps one by one.
_CHUNKED = re.compile(r"(blocks)\.\d+\.(\d+\.(?:norm1|norm2|attn|mlp|ls1|ls2)\.)")
_STACKED = re.compile(
    _LAYER
    + r"(?:attention\.attention|self_attn|attn)\.(query|key|value|q_proj|k_proj|v_proj)\.(\w+)"
)


def _translated(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """Whose names these are, and the tensors under timm's; None if no known ones."""
    if any(_CHUNKED.match(key) for key in state):
        plain = {_CHUNKED.sub(r"\1.\2", key): value for key, value in state.items()}
        return "DINOv2's training", plain
    if not any(_STACKED.fullmatch(key) for key in state):
        return None
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _STACKED.fullmatch(key):
            layer, part, kind = match.groups()
            stacks.setdefault(f"blocks.{layer}.attn.qkv.{kind}", {})[part[0]] = value
            continue
        for pattern, replacement in _RENAMED:
            if match := pattern.fullmatch(key):
                block = f"blocks.{match[1]}." if pattern.pattern.startswith(_LAYER) else ""
                key = block + match.expand(replacement)
                break
        if key == "cls_token":
            value = value.reshape(1, 1, -1)
        elif key == "pos_embed" and value.dim() == 2:
            value = value[None]
        found[key] = value
    for key, parts in stacks.items():
        if parts.keys() == set("qkv"):  # an incomplete stack stays missing
            found[key] = torch.cat([parts["q"], parts["k"], parts["v"]])
    ours = any("attention_norm" in key for key in state)
    return ("VPT's code" if ours else "Hugging Face"), found


# ---- JAX archives


_JAX_PREFIXES = ("", "opt/target/", "params/", "params/img/")
# Heads, the text tower, the optimiser's state.
_JAX_BESIDE = re.compile(
    r"(.*/)?(head|pre_logits|MAPHead_0)/|opt/(?!target/)|params/(?!img/)(txt/|t$|b$)"
)


def _load_jax(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    content: Mapping[str, Any],
    name: str,
    prefix: str,
) -> LoadedWeights:
    """Of an .npz as the code of ViT, AugReg and Big Vision writes it, by timm's reader."""
    vit: Any = model
    readable = (
        hasattr(model, "load_pretrained")
        and hasattr(model, "blocks")
        and isinstance(getattr(getattr(model, "patch_embed", None), "proj", None), nn.Conv2d)
        and isinstance(getattr(model, "pos_embed", None), Tensor)
    )
    if not readable or isinstance(source, Mapping):
        raise CheckpointError(
            f"weights {name}: a JAX archive, which is read into vision transformers alone, got "
            f"{_called(model)}"
        )
    expected = _jax_outline(model, content, prefix)
    found = {key: value for key in content if (value := as_tensor(content[key])) is not None}
    unread = [key for key in found if key not in expected and _JAX_BESIDE.match(key)]
    unknown = [key for key in content if key not in expected and key not in unread]
    given = {key: found[key] for key in expected if key in found}
    _refuse_misfits(model, name, expected, list(expected), found, given, unknown)
    own = model.state_dict()
    head = _head_names(model)
    needed = [key for key in own if not key.startswith(head)]
    if not any(tensor.is_meta for tensor in own.values()):
        twin = copy.deepcopy(vit)
        filled = twin.state_dict()
        with torch.no_grad():
            for key in needed:  # what timm leaves as it is would else not be seen
                filled[key].fill_(torch.nan)
        try:
            twin.load_pretrained(str(source))
        except Exception as error:  # as with timm's other converters
            raise CheckpointError(
                f"weights {name}: timm's reader of JAX archives refuses them ({first_line(error)})"
            ) from error
        _fill(name, own, {key: filled[key] for key in needed})
    remarks = []
    rows = next(found[key].shape[1] for key in expected if key.endswith("pos_embedding"))
    if rows != len(own["pos_embed"][0]):
        remarks = [f"pos_embed resampled from {rows} to {len(own['pos_embed'][0])} positions"]
    rest = {"of heads and training": len(unread)} if unread else {}
    return LoadedWeights(name, len(needed), "", prefix, "JAX", remarks, rest)


def _jax_outline(model: nn.Module, content: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Names, shapes and types that the archive must have, as tensors on the meta device."""
    vit: Any = model
    depth, block, stem = len(vit.blocks), vit.blocks[0], vit.patch_embed.proj
    width, heads = vit.embed_dim, block.attn.num_heads
    head_width, hidden = block.attn.qkv.out_features // (3 * heads), block.mlp.fc1.out_features
    stacked = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in content
    newer = stacked or prefix.startswith("params/") or f"{prefix}pos_embedding" in content
    attn, mlp, norm2 = (0, 0, 1) if newer else (1, 3, 2)
    position = "pos_embedding" if newer else "Transformer/posembed_input/pos_embedding"
    rows = getattr(content.get(prefix + position), "shape", (1, vit.pos_embed.shape[1]))
    attention, dense = f"MultiHeadDotProductAttention_{attn}", f"MlpBlock_{mlp}/Dense_"
    layer: dict[str, tuple[int, ...]] = {
        f"{attention}/out/kernel": (heads, head_width, width),
        f"{attention}/out/bias": (width,),
        f"{dense}0/kernel": (width, hidden),
        f"{dense}0/bias": (hidden,),
        f"{dense}1/kernel": (hidden, width),
        f"{dense}1/bias": (width,),
    }
    for part in ("query", "key", "value"):
        layer[f"{attention}/{part}/kernel"] = (width, heads, head_width)
        layer[f"{attention}/{part}/bias"] = (heads, head_width)
    for part in ("LayerNorm_0", f"LayerNorm_{norm2}"):
        layer |= {f"{part}/scale": (width,), f"{part}/bias": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (*stem.kernel_size, stem.in_channels, width),
        "embedding/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        position: (1, rows[1] if len(rows) == 3 else vit.pos_embed.shape[1], width),
    }
    if vit.cls_token is not None:
        shapes["cls"] = (1, 1, width)
    for name in ["encoderblock"] if stacked else [f"encoderblock_{i}" for i in range(depth)]:
        leading = (depth,) if stacked else ()
        shapes |= {f"Transformer/{name}/{k}": (*leading, *shape) for k, shape in layer.items()}
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


# ---- words


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier begin with."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{each}." for each in ([named] if isinstance(named, str) else named))


def _called(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _misshapen(key: str, found: Tensor, own: Tensor) -> str:
    return f"{key} is {tuple(found.shape)} for {tuple(own.shape)}"


def _fits(found: Tensor, own: Tensor | None) -> bool:
    """Whether numbers of the file's type mean the same in the model's."""
    if found.layout != torch.strided or found.is_quantized:
        return False
    return found.is_floating_point() or (own is not None and found.dtype == own.dtype)
