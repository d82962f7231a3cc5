"""The blocks of timm's vision transformers, told apart by their attributes: `Block`, the parallel
ones, and differential attention, each of which is the formula of a block with its products read in
another order, or side by side.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from ..errors import UnsupportedBackbone
from .reading import BlockReader
from .view import Behind, BlockWeights, Difference, Linear, Norm, Product, Stacked, Summed

Same = TypeVar("Same")


def read_block(block: nn.Module, name: str, post: bool = False) -> BlockWeights:
    """Neutral weights of a block; raises UnsupportedBackbone naming what does not fit.

    Args:
        post: its norms stand behind attention and MLP.
    """
    if hasattr(block, "in_proj"):
        return _scaling(BlockReader(block, name))
    if hasattr(block, "attns"):
        return _things(BlockReader(block, name))
    read = BlockReader(block, name)
    read.whole("attn.rel_pos")  # whose bias is given beside the rows
    weights = BlockWeights(
        **norms(read, post),
        **attention(read, read.linear("attn.qkv")),
        scale1=None if post else read.layer_scale("ls1"),
        scale2=None if post else read.layer_scale("ls2"),
        **read.mlp("mlp"),
    )
    read.close()
    return weights


def norms(read: BlockReader, post: bool) -> dict[str, Any]:
    """The fields of a block's two norms."""
    names = ("post1", "post2") if post else ("norm1", "norm2")
    return {names[0]: read.norm("norm1"), names[1]: read.norm("norm2")}


def attention(read: BlockReader, qkv: Product, path: str = "attn") -> dict[str, Any]:
    """The fields of an attention of timm, and of what stands behind it.

    Raises:
        UnsupportedBackbone: its output is gated.
    """
    if read.has(f"{path}.gate"):
        raise UnsupportedBackbone(f"{read.name}.{path}.gate is set: gated attention is not folded")
    return {
        **heads(read, qkv, f"{path}."),
        "attn_norm": read.optional_norm(f"{path}.norm"),
        "proj": read.linear(f"{path}.proj"),
    }


def heads(read: BlockReader, qkv: Product, path: str) -> dict[str, Any]:
    """The fields of queries, keys and values.

    With two softmaxes (`sub_norm`) heads come in fours: queries and keys of the first stand there
    twice, those of the second too, once with either half of the same values.
    """
    count, difference = read.get(f"{path}num_heads"), None
    if read.has(f"{path}sub_norm"):
        difference = _difference(read, path)
        if read.has(f"{path}norm"):
            raise UnsupportedBackbone(
                f"{read.name}.{path}norm stands behind a difference of two attentions, which is "
                "not folded"
            )
        q, k, v = qkv.thirds()
        twice = q.repeated(2, 2 * count), k.repeated(2, 2 * count), v.repeated(2, count)
        qkv, count = Stacked(twice), 4 * count
    width = sum(len(part.weight) for part in qkv.parts) // (3 * count)
    # timm's fused attention takes d^-1/2 and leaves the attribute unread
    fused = read.has(f"{path}fused_attn") and read.get(f"{path}fused_attn")
    return {
        "qkv": qkv,
        "q_norm": read.optional_norm(f"{path}q_norm"),
        "k_norm": read.optional_norm(f"{path}k_norm"),
        "num_heads": count,
        "scale": width**-0.5 if fused else read.get(f"{path}scale"),
        "difference": difference,
    }


def _difference(read: BlockReader, path: str) -> Difference:
    def tensors(*names: str) -> tuple[Any, ...]:
        return tuple(read.tensor(f"{path}lambda_{name}") for name in names)

    single = read.has(f"{path}lambda_a")
    pair = (tensors("a"), tensors("b")) if single else (tensors("q1", "k1"), tensors("q2", "k2"))
    return Difference(*pair, read.get(f"{path}lambda_init"), read.norm(f"{path}sub_norm"))


def _scaling(read: BlockReader) -> BlockWeights:
    """`ParallelScalingBlock`, `DiffParallelScalingBlock`: one norm, one product for hidden rows,
    queries, keys and values, one sum.
    """
    packed, widths = read.linear("in_proj"), read.get("in_split")
    weights, biases = packed.weight.split(widths), [read.tensor("mlp_bias"), None, None, None]
    if packed.bias is not None:
        biases = list(packed.bias.split(widths))
    fc1, *qkv = map(Linear, weights, biases)
    if read.has("out_proj"):
        both, width = read.linear("out_proj"), packed.weight.shape[1]
        proj = Linear(both.weight[:, :width], both.bias)
        fc2 = Linear(both.weight[:, width:], None)
    else:
        proj, fc2 = read.linear("attn_out_proj"), read.linear("mlp_out_proj")
    gamma = read.layer_scale("ls")
    found = BlockWeights(
        norm1=read.norm("in_norm"),
        **heads(read, Stacked(tuple(qkv)), ""),
        proj=proj,
        scale1=gamma,
        fc1=fc1,
        activation=read.activation("mlp_act"),
        fc2=fc2,
        scale2=gamma,
        parallel=True,
    )
    read.close()
    return found


def _things(read: BlockReader) -> BlockWeights:
    """`ParallelThingsBlock`: the sum of several attentions, then that of several MLPs, all of which
    normalise the same rows: one attention with the heads of all, one MLP with all hidden rows.
    """
    count = len(read.get("attns"))
    attentions = [
        attention(read, read.linear(f"attns.{i}.attn.qkv"), f"attns.{i}.attn") for i in range(count)
    ]
    mlps = [read.mlp(f"ffns.{i}.mlp") for i in range(count)]

    def plain(name: str) -> tuple[Norm, list[Norm]]:
        own = [read.norm(f"{name}.{i}.norm") for i in range(count)]
        eps, kind = _same(read, f"{name}.*.norm", [(norm.eps, norm.kind) for norm in own])
        return Norm(None, None, eps, kind), own

    def behind(own: list[Norm], products: list[Linear]) -> tuple[Behind, ...]:
        return tuple(map(Behind, own, products))

    def summed(name: str, products: list[Linear]) -> Summed:
        scales = [read.layer_scale(f"{name}.{i}.ls") for i in range(count)]
        return Summed(tuple(zip(products, scales)))

    norm1, first = plain("attns")
    norm2, second = plain("ffns")
    each = zip(*(a.pop("qkv").thirds() for a in attentions))
    qkv = [part for parts in each for part in behind(first, list(parts))]
    for field in ("q_norm", "k_norm", "attn_norm", "difference"):
        if any(a.pop(field) is not None for a in attentions):
            raise UnsupportedBackbone(
                f"{read.name}.attns.*.attn has a norm or a difference of its own, which is not "
                "folded"
            )
    for field in ("mlp_norm", "mlp_pre"):
        if any(m.pop(field) is not None for m in mlps) or any(m["gated"] for m in mlps):
            raise UnsupportedBackbone(
                f"{read.name}.ffns.*.mlp has a norm or a gate of its own, which is not folded"
            )
    found = BlockWeights(
        norm1=norm1,
        qkv=Stacked(tuple(qkv)),
        num_heads=sum(a["num_heads"] for a in attentions),
        scale=_same(read, "attns.*.attn.scale", [a["scale"] for a in attentions]),
        proj=summed("attns", [a["proj"] for a in attentions]),
        norm2=norm2,
        fc1=Stacked(behind(second, [m["fc1"] for m in mlps])),
        activation=_same(read, "ffns.*.mlp.act", [m["activation"] for m in mlps]),
        fc2=summed("ffns", [m["fc2"] for m in mlps]),
    )
    read.close()
    return found


def _same(read: BlockReader, path: str, found: list[Same]) -> Same:
    if any(one != found[0] for one in found):
        raise UnsupportedBackbone(f"{read.name}.{path} differ: {found}, expected the same")
    return found[0]
