"""Tiny CLIPs of every library, with random weights of trained size, and a tokenizer of words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pae
from tests.libraries import SIZE, WIDE, version_4
from tests.tiny import filled

ROWS, WORDS = 20, 60  # rows of a text; tokens of the vocabulary
START, END, PAD = WORDS - 2, WORDS - 1, 0
HF_TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
HF_TEXT |= {"intermediate_size": 48, "vocab_size": WORDS, "max_position_embeddings": ROWS}
OPEN_VISION = {"layers": 3, "width": 32, "head_width": 8, "mlp_ratio": 2.0}
OPEN_VISION |= {"patch_size": 4, "image_size": SIZE}
OPEN_TEXT = {"context_length": ROWS, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 3}
NAMES = ("cat", "tree frog", "big red sports car", "oak")


class Words:
    """A tokenizer as open_clip has them: one token per word or mark; what is too long is cut."""

    context_length = ROWS

    def __call__(self, texts: Sequence[str], context_length: int = ROWS) -> Tensor:
        found = torch.full((len(texts), context_length), PAD)
        for row, text in zip(found, texts):
            words = re.findall(r"\w+|[^\w\s]", text)
            ids = [START, *(1 + sum(map(ord, word)) % (START - 1) for word in words), END]
            ids = ids[: context_length - 1] + [END] if len(ids) > context_length else ids
            row[: len(ids)] = torch.tensor(ids)
        return found


class WordsOfSiglip(Words):
    """Without a start token, as SigLIP's."""

    def __call__(self, texts: Sequence[str], context_length: int = ROWS) -> Tensor:
        found = super().__call__(texts, context_length + 1)[:, 1:]
        return found.masked_fill(found == END, 1)


def _hf(eos: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        text = {**HF_TEXT, "bos_token_id": START, "eos_token_id": eos, "pad_token_id": PAD}
        parts: dict[str, Any] = {"text_config": text, "vision_config": WIDE}
        return transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=16))

    return build


def _hf_siglip() -> nn.Module:
    import transformers

    text = {**HF_TEXT, "projection_size": 32}
    parts: dict[str, Any] = {"text_config": text, "vision_config": WIDE}
    return transformers.SiglipModel(transformers.SiglipConfig(**parts))


def _open_clip(name: str, embed: int = 16, bias: float | None = None, **text: Any) -> Any:
    def build() -> nn.Module:
        from open_clip import model

        own = {**OPEN_TEXT, **text}
        return getattr(model, name)(embed, OPEN_VISION, own, quick_gelu=True, init_logit_bias=bias)

    return build


SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
CLIPS: dict[str, Callable[[], nn.Module]] = {
    "transformers": _hf(END),
    "transformers, highest id": _hf(2),
    "transformers, SigLIP": _hf_siglip,
    "open_clip": _open_clip("CLIP"),
    "open_clip, text tower": _open_clip("CustomTextCLIP", pool_type="eos", eos_id=END),
    "open_clip, layer scale": _open_clip("CustomTextCLIP", ls_init_value=0.1),
    "open_clip, SigLIP": _open_clip("CustomTextCLIP", bias=-2.0, **SIGLIP),
}
MORE = {"open_clip, one block": _open_clip("CLIP", layers=1)}
CAUSAL = [name for name in CLIPS if not name.endswith("SigLIP")]


def runs(name: str, dtype: torch.dtype) -> bool:
    """Whether the library's own model does."""
    theirs = name.startswith("transformers") and name in CAUSAL
    return not (theirs and dtype == torch.float64 and version_4())


def clip(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """One of `CLIPS`, in eval mode; its scale is 3."""
    if not runs(name, dtype):
        pytest.skip("transformers 4 puts the least number of fp64 into a causal mask of fp32")
    made: Any = filled((CLIPS | MORE)[name]())
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.copy_(1 + 0.3 * part.bias)
        made.logit_scale.fill_(3.0)
    return made.to(dtype).eval()


def tokenizer(name: str) -> Words:
    return WordsOfSiglip() if name.endswith("SigLIP") else Words()


def own_text_features(model: Any, ids: Tensor) -> Tensor:
    """By the model's own forward."""
    if hasattr(model, "encode_text"):
        return model.encode_text(ids)
    out = model.get_text_features(ids)
    return out if isinstance(out, Tensor) else out.pooler_output


def own_logits(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    """(B, C) by the model's own forward."""
    if hasattr(model, "get_logits"):
        return model.get_logits(images, ids)[0]
    return model(input_ids=ids, pixel_values=images).logits_per_image


class Context(nn.Module):
    """Learned rows, shared by the classes or one set for each."""

    def __init__(self, num_tokens: int = 4, position: str = "end", classes: int = 0) -> None:
        super().__init__()
        self.num_tokens, self.position, self.classes = num_tokens, position, classes

    def bind(self, width: int, depth: int) -> None:
        sets = (self.classes,) if self.classes else ()
        generator = torch.Generator().manual_seed(4)
        values = torch.randn(*sets, self.num_tokens, width, generator=generator)
        self.vectors = nn.Parameter(0.5 * values)

    def rows(self) -> Tensor:
        return self.vectors


def prompted(
    name: str = "open_clip",
    image: pae.prompts.PromptFamily | None = None,
    text: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
    names: Sequence[str] = NAMES,
    **options: Any,
) -> pae.PromptedCLIP:
    """A model in training mode over one of `CLIPS`, with prompts as large as its rows."""
    if "pair" not in options:
        image = pae.prompts.VPTShallow(3) if image is None else image
        text = Context() if text is None else text
    options = {"tokenizer": tokenizer(name), **options}
    model = pae.prompted_clip(clip(name, dtype), image, text, names, **options).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.vision.prompts.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator))
    return model
