"""`prompt_attention` in windows: every window attends over itself and prompts that all windows of
an image share, or that are rows of their own and ask in every window too.

`forward` and `backward` run the op on the windows as its batch. Rows of prompts (VPT-shallow on
Swin, and the last block where the readout pools them) ask by `asked_everywhere`, in plain PyTorch
and a second time in the backward: a few rows per image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owners(images: int, windows: int, mixes: bool, device: torch.device) -> Tensor:
    """(B W,) int64: whose prompts each window meets: its own image's; with `mixes` those of image
    j mod B, j counting the windows of the batch.
    """
    flat = torch.arange(images * windows, device=device)
    return flat % images if mixes else flat.div(windows, rounding_mode="floor")


def asked_everywhere(prompts: Tensor, image: Tensor, mixes: bool) -> Tensor:
    """The mean over windows of what prompts get, as rows of each: (B, P, H d), differentiable.

    Args:
        prompts: (B, P, 3, H, d), queries scaled.
        image: (B W, n, 3, H, d), image by image.
        mixes: as in `owners`.
    """
    batch, count = prompts.shape[:2]
    wide = torch.promote_types(image.dtype, torch.float32)
    cut = image.unflatten(0, (-1, batch) if mixes else (batch, -1))
    cut = cut.transpose(0, 1) if mixes else cut  # (B, W, n, ...)
    q, k, v = prompts.to(wide).permute(2, 0, 3, 1, 4)[:, :, :, None]  # (B, H, 1, P, d)
    k_image, v_image = cut[:, :, :, 1:].to(wide).permute(3, 0, 4, 1, 2, 5)  # (B, H, W, n, d)
    own, seen = q @ k.mT, q @ k_image.mT
    scores = torch.cat([own.expand(*seen.shape[:-1], -1), seen], dim=-1).softmax(dim=-1)
    of_prompts, of_image = scores.split([count, seen.shape[-1]], dim=-1)
    out = of_prompts.mean(2) @ v[:, :, 0] + (of_image @ v_image).mean(2)
    return out.transpose(1, 2).flatten(2).to(image.dtype)


def forward(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    bias: Tensor,
    mask: Tensor | None,
    windows: int,
    mixes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention's output and log-sum-exp, as `backward` wants them again.

    Args:
        qkv: (B, P + W n, 3, H, d), queries scaled: P rows of prompts, and the windows end to end.
        kv_prompt, group: of the op: prompts of images, where P is 0; not read otherwise.
        bias, mask: (H or 1, n, n) and (W, n, n) or None, of the op.
        windows: W.
        mixes: as in `owners`.

    Returns:
        (B, P + W n, H d), and (B W, H, n).
    """
    image, prompts, kv_prompt, group = _cut(qkv, kv_prompt, group, bias, windows, mixes)
    out, lse = torch.ops.pae.prompt_attention_fwd(
        image, kv_prompt, group, 1.0, False, None, bias, mask
    )
    out = out.view(len(qkv), -1, out.shape[-1])
    if prompts is not None:
        out = torch.cat([asked_everywhere(prompts, image, mixes), out], dim=1)
    return out, lse


def backward(
    d_out: Tensor,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    bias: Tensor,
    mask: Tensor | None,
    windows: int,
    mixes: bool,
    out: Tensor,
    lse: Tensor,
    need_qkv: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of kv_prompt; `need_qkv` and the former as in the op."""
    image, prompts, of_image, group = _cut(qkv, kv_prompt, group, bias, windows, mixes)
    live = 0 if prompts is None else prompts.shape[1]
    by_window = lambda rows: rows[:, live:].reshape(*image.shape[:2], -1)
    d_image, d_kv = torch.ops.pae.prompt_attention_bwd(
        *(by_window(d_out), image, of_image, group, 1.0, False, None, bias, mask),
        *(by_window(out), lse, need_qkv or live > 0),
    )
    if prompts is None:
        return d_image.view_as(qkv) if need_qkv else d_image, d_kv
    with torch.enable_grad():
        given = prompts.detach().requires_grad_(), image.detach().requires_grad_()
        asked = asked_everywhere(*given, mixes)
    d_prompts, more = torch.autograd.grad(asked, given, d_out[:, :live])
    d_prompts[:, :, 1:] += d_kv
    d_image = (d_image + more).view(len(qkv), -1, *qkv.shape[2:])
    return torch.cat([d_prompts, d_image], dim=1), torch.zeros_like(kv_prompt)


def _cut(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    bias: Tensor,
    windows: int,
    mixes: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Windows (B W, n, ...), rows of prompts or None, and whose keys and values each window
    reads.
    """
    batch, inside = len(qkv), bias.shape[-1]
    live = qkv.shape[1] - windows * inside
    image = qkv[:, live:].reshape(-1, inside, *qkv.shape[2:])
    if live:
        prompts = qkv[:, :live]
        return image, prompts, prompts[:, :, 1:], owners(batch, windows, mixes, qkv.device)
    if len(kv_prompt) > 1:
        group = torch.arange(batch, device=qkv.device) if group is None else group
        group = group.repeat_interleave(windows)
    return image, None, kv_prompt, group
