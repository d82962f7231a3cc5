"""What the suite of prompt_attention shares: inputs, its definition, executions and paths."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from pae_kernels import prompt_attention
from pae_kernels.attention import reference, tiles
from tests.errors import assert_rounded, error
from tests.kernels.executions import FP32, each

OP = "prompt_attention"
LONG = bool(os.environ.get("PAE_LONG"))  # tests/more.sh
FWD = torch.ops.pae.prompt_attention_fwd.default
BWD = torch.ops.pae.prompt_attention_bwd.default


def inputs(batch=3, tokens=7, prompts=4, heads=2, width=8, sets=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
    kv = torch.randn(sets, prompts, 2, heads, width, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), kv.to(dtype)


def places(tokens, heads=None, windows=None, dtype=FP32, seed=0):
    """What stands at which place: a bias of so many heads, and masks of so many windows, of which
    the first hides nothing and the others a part of the keys, by -100 or for good.
    """
    generator = torch.Generator().manual_seed(seed + 5)
    found = {}
    if heads is not None:
        found["bias"] = 2 * torch.randn(heads, tokens, tokens, generator=generator).to(dtype)
    if windows is not None:
        parts = torch.randint(2, (windows, tokens), generator=generator)
        parts[0] = 0
        apart = parts[:, :, None] != parts[:, None]
        hides = torch.tensor([-100.0, -torch.inf])[torch.arange(windows) % 2]
        found["mask"] = torch.where(apart, hides[:, None, None], 0.0).to(dtype)
    return found


def by_definition(
    qkv, kv, group=None, scale=None, queries="all", log_multiplicity=None, bias=None, mask=None,
    causal=False,
):  # fmt: skip
    """The formula with every softmax written out, differentiable."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    given = qkv, kv, group, scale, queries == "class", log_multiplicity
    return reference.prompt_attention(*given, bias, mask, causal)


def results(function, qkv, kv, d_out=None, **options):
    """(out, lse, gradient of qkv, gradient of kv)."""
    qkv = qkv.detach().requires_grad_()
    kv = kv.detach().requires_grad_()
    out, lse = function(qkv, kv, **options)
    if d_out is None:
        generator = torch.Generator().manual_seed(9)
        d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, (qkv, kv), d_out)
    return [out.detach(), lse.detach(), *grads]


def assert_as_defined(qkv, kv, d_out=None, function=prompt_attention, **options):
    """Value and gradients equal those of the definition, computed in fp64, but for rounding."""
    got = results(function, qkv, kv, d_out, **options)
    wide = d_out if d_out is None else d_out.double()

    def definition():
        return results(by_definition, qkv.double(), kv.double(), wide, **options)

    assert_rounded(got, definition, qkv.dtype, ("out", "lse", "d_qkv", "d_kv"))
    return got


LAYOUTS = {
    "views_of_a_product": lambda t: t.flatten(2).view(t.shape),
    "heads_first": lambda t: t.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
    "width_before_heads": lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
    "tokens_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every_second_entry": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t[:, :2] + 1, t, t[:, :1]], dim=1)[:, 2 : 2 + t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


def force(monkeypatch, backward, block_n=16, images=None):
    """Tiles of 16 rows, so that tiny inputs make several of them, and one of the two backwards."""
    small = tiles.Tile(16, block_n, 4, 1)
    whole = lambda qkv, rows: tiles.Tile(max(16, 1 << (rows - 1).bit_length()), block_n, 4, 1)
    monkeypatch.setattr(tiles, "forward", lambda qkv, rows: small)
    monkeypatch.setattr(tiles, "backward_split", lambda qkv, rows: small)
    monkeypatch.setattr(
        tiles, "backward_whole", whole if backward == "whole" else lambda qkv, rows: None
    )
    if images is not None:
        monkeypatch.setattr(tiles, "images_per_program", lambda qkv, tile: images)


def each_path(*kinds):
    """A test of these executions, in the interpreter on both backwards."""
    paths = {kind: ["whole", "split"] if kind == "interpreter" else [None] for kind in kinds}
    return each(OP, "path", through=["path"], **paths)


def along(interpreter=(), names="", **cases):
    """The same with cases: those of the interpreter on the two backwards in turn (which is not the
    turn of dtypes in the lists), so that each has some; with PAE_LONG on both.
    """
    single = [c if isinstance(c, tuple) else (c,) for c in interpreter]
    cases = {
        k: [(None, *(c if isinstance(c, tuple) else (c,))) for c in v] for k, v in cases.items()
    }
    both = [
        (path, *case)
        for number, case in enumerate(single)
        for turn, path in enumerate(("whole", "split"))
        if LONG or len(single) == 1 or (number + number // 2) % 2 == turn
    ]
    return each(OP, f"path, {names}", through=["path"], interpreter=both, **cases)


def sdpa(
    qkv, kv, group=None, scale=None, queries="all", log_multiplicity=None, bias=None, mask=None,
    causal=False,
):  # fmt: skip
    """PyTorch's attention over concatenated keys, and nothing for the log-sum-exp."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q[:, :, :1] if queries == "class" else q
    k_p, v_p = reference.take_groups(kv, group, len(qkv)).permute(2, 0, 3, 1, 4)
    n = reference.Sizes.of(qkv, kv, queries == "class")
    if causal:
        mask = torch.zeros(1, n.tokens, n.tokens).to(q) if mask is None else mask
        mask = mask + torch.ones_like(mask).tril().log()
    added = reference._added(n, group, log_multiplicity, bias, mask)
    if added is not None:
        added = added.to(q.dtype).expand(*q.shape[:3], -1)
    out = F.scaled_dot_product_attention(
        q, torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2), attn_mask=added, scale=scale
    )
    return out.transpose(1, 2).flatten(2), out[..., 0]


def check(execution, qkv, kv, d_out=None, **options):
    """Results of a version, after comparing them with the definition in fp64."""
    if execution.kind == "reference":
        return assert_as_defined(qkv, kv, d_out=d_out, **options)
    qkv, kv, d_out = (t if t is None else t.to(execution.device) for t in (qkv, kv, d_out))
    for name in ("group", "log_multiplicity", "bias", "mask"):
        if options.get(name) is not None:
            options[name] = options[name].to(execution.device)
    plain = execution.pick(interpreter=by_definition, other=sdpa)
    got = results(prompt_attention, qkv, kv, d_out, **options)
    theirs = results(plain, qkv, kv, d_out, **options)
    d_wide = None if d_out is None else d_out.double()
    exact = results(by_definition, qkv.double(), kv.double(), d_wide, **options)
    for i, name in ((0, "out"), (2, "d_qkv"), (3, "d_kv")):
        execution.assert_as_exact(got[i], theirs[i], exact[i], name)
    # fp32 sums of products in the inputs' own precision, whatever that is
    assert got[1].dtype == FP32
    if execution.kind in ("gpu", "sdpa"):  # the latter's is PyTorch's
        assert exact[1].numel() == 0 or error(got[1], exact[1]) < 3e-5
    else:
        torch.testing.assert_close(got[1], exact[1].float(), rtol=2e-6, atol=2e-6)
    return got
