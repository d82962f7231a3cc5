"""Random two-tower models: the fast engine equals the reference in value and in every gradient.

Towers of every library, names and templates of random lengths, contexts of every kind, every image
family and pair. As many others as wanted:

    PAE_RANDOM_PAIRS=500 pytest --fresh tests/pae/test_random_pairs.py
"""

import os
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import pae
from pae import text
from pae.prompts import (
    DAPT,
    METHODS,
    UPT,
    ApproximatedPair,
    CoOp,
    TextContext,
    UPTDeep,
    VPTDeep,
)
from tests import clips
from tests.errors import distance
from tests.libraries import images
from tests.properties import examples
from tests.tiny import small

pytest.importorskip("transformers", reason="pip install pae[hf]")
pytest.importorskip("open_clip", reason="pip install pae[clip]")

COUNT = 40  # models of an ordinary run
VALUES, GRADIENTS = 1e-9, 1e-7  # relative; the second also of the largest gradient's thousandth

# the image families that one tower of every library takes without labels or a class token
PLAIN = ["vpt-deep", "vpt-shallow", "bpt", "vapt", "e2vpt", "apt", "lspt", "vfpt", "pro-vpt"]
WORD = st.sampled_from(["red", "cat", "oak", "tree", "frog", "very", "x"])
TOWERS = [name for name in (*clips.CLIPS, *clips.MORE) if clips.runs(name, torch.float64)]
PAIRS = {"coop": CoOp, "dapt": DAPT, "upt": UPT, "upt-deep": UPTDeep, "apt-vl": ApproximatedPair}


@dataclass
class Case:
    """One model and how it is asked; what is printed when the engines differ."""

    tower: str
    names: list[str]
    template: str | None
    family: str | None
    kind: str
    given: dict[str, Any] | None
    kld: bool
    batch: int
    training: bool
    of_images: bool
    grouped: bool
    seed: int


def words(least: int, most: int) -> st.SearchStrategy[str]:
    return st.lists(WORD, min_size=least, max_size=most).map(" ".join)


@st.composite
def cases(draw) -> Case:
    tower = draw(st.sampled_from(TOWERS))
    names = draw(st.lists(words(1, 5), min_size=1, max_size=5))
    kind = draw(st.sampled_from(["apart", "apart", "apart", *PAIRS]))
    count, position = draw(st.integers(0, 5)), "end"
    given: dict[str, Any] | None = None
    if kind in ("apart", "coop"):
        if not tower.endswith("SigLIP"):
            position = draw(st.sampled_from(["end", "middle"]))
        own = draw(st.sampled_from([0, len(names)]))
        given = {"num_tokens": count, "position": position, "num_classes": own}
        if kind == "apart":
            given = draw(st.sampled_from([given, given, None]))
    elif kind == "dapt":
        given = {"num_tokens": count, "image_tokens": draw(st.integers(0, 3))}
    else:
        given = {"num_tokens": max(1, count), "dropout": draw(st.sampled_from([0.0, 0.3]))}
        more = {"upt": {"faithful": draw(st.booleans())}, "upt-deep": {"hidden": 6}}
        rows = {"rank": 2, "num_rows": draw(st.integers(0, 2))}
        more["apt-vl"] = {**rows, "context_tokens": draw(st.integers(0, 3))}
        given |= more[kind]
    front = draw(words(0, 2)) if position == "end" else ""
    template = f"{front} {{}} {draw(words(0, 2))}".strip()
    return Case(
        tower,
        names,
        draw(st.sampled_from([None, template])),
        draw(st.sampled_from([None, *PLAIN])) if kind == "apart" else None,
        kind,
        given,
        kld=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        training=draw(st.booleans()),
        of_images=draw(st.booleans()),
        grouped=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def build(case: Case) -> pae.PromptedCLIP:
    torch.manual_seed(case.seed)
    options: dict[str, Any] = {"template": case.template}
    if case.kind == "apart":
        family = VPTDeep(0) if case.family is None else small(METHODS[case.family])
        context = None if case.given is None else TextContext(**case.given)
        paired = case.kld and case.family == "vpt-deep"
        options |= {"kld": pae.KLD(dim=3) if paired else None}
        tower, words_of = clips.clip(case.tower), clips.tokenizer(case.tower)
        made = pae.prompted_clip(tower, family, context, case.names, tokenizer=words_of, **options)
    else:
        pair = PAIRS[case.kind](**case.given)
        made = clips.prompted(case.tower, pair=pair, names=case.names, **options)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for p in (q for q in made.parameters() if q.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    if isinstance(made.pair, DAPT):
        y = torch.arange(2 * len(case.names)) % len(case.names)
        made.pair.find_prototypes(made, [(images(len(y)), y)])
    return made.train(case.training)


def outcome(made: pae.PromptedCLIP, case: Case, engine: str) -> dict[str, torch.Tensor | None]:
    """Logits, loss and the loss' gradients, by name."""
    x = images(case.batch).requires_grad_(case.of_images)
    y = torch.arange(case.batch) % len(case.names)
    wanted = {name: p for name, p in made.named_parameters() if p.requires_grad}
    if case.of_images:
        wanted["images"] = x
    torch.manual_seed(case.seed)  # dropout
    logits = made(x, engine)
    torch.manual_seed(case.seed)
    scalar = loss = made.loss(x, y, engine)
    # one class has one logit, whose cross-entropy is 0
    generator = torch.Generator().manual_seed(case.seed)
    for part in (logits, made.features(x, engine), made.text_features(engine)):
        weights = torch.randn(part.shape, generator=generator, dtype=part.dtype)
        scalar = scalar + (part * weights).sum()
    if not scalar.requires_grad:
        return {"logits": logits, "loss": loss}
    grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return {"logits": logits.detach(), "loss": loss.detach(), **dict(zip(wanted, grads))}


def differences(case: Case) -> dict[str, float]:
    """What the engines disagree about, and by how much, relative."""
    made = build(case)
    expected, got = (outcome(made, case, engine) for engine in ("reference", "fast"))
    values = ("logits", "loss")
    sizes = {name: 0.0 if t is None else t.norm().item() for name, t in expected.items()}
    largest = max([0.0, *(size for name, size in sizes.items() if name not in values)])
    found = {}
    for name, wanted in expected.items():
        if (wanted is None) != (got[name] is None):
            found[name] = float("inf")
        elif wanted is not None:
            most, least = (VALUES, 1e-3) if name in values else (GRADIENTS, 1e-3 * largest)
            off = distance(got[name], wanted) / max(sizes[name], least, 1e-300)
            if not off <= most:
                found[name] = off
    return found


def count() -> int:
    return int(os.environ.get("PAE_RANDOM_PAIRS", 0)) or examples(COUNT).max_examples


def search(count: int, shrink: bool = True) -> None:
    """Raise on a model whose engines differ; hypothesis shrinks it first."""
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    phases += [hypothesis.Phase.shrink] if shrink else []
    settings = hypothesis.settings(
        max_examples=count,
        phases=phases,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )

    @settings
    @hypothesis.given(case=cases())
    def engines_agree(case):
        # a row or two more is a group of its own
        with pytest.MonkeyPatch.context() as patch:
            if case.grouped:
                patch.setitem(text._GROUP, "cpu", 1)
            assert differences(case) == {}

    engines_agree()


def test_random_pairs():
    search(count())


# ---- a fault is seen


def late_end(monkeypatch):
    """Texts are read a row too early."""
    walk = pae.clip.walk
    monkeypatch.setattr(
        pae.clip,
        "walk",
        lambda plan, known, shared, own, at, *more: walk(
            plan, known, shared, own, [(a - 1).clamp(min=0) for a in at], *more
        ),
    )


def no_order(monkeypatch):
    """Groups of classes stay in the order of their lengths."""
    own = pae.PromptedText._groups

    def groups(self):
        found, order = own(self)
        return found, None if order is None else order.sort().values

    monkeypatch.setattr(pae.PromptedText, "_groups", groups)


def missing_constant(monkeypatch):
    """The last block forgets what the constant rows are."""
    made = pae.clip.constants

    def zeros(plan, x):
        found = made(plan, x)
        return text.Constants(found.kv, found.normed * 0)

    monkeypatch.setattr(pae.clip, "constants", zeros)


@pytest.mark.parametrize("fault", [late_end, no_order, missing_constant])
def test_a_fault_is_seen(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        search(COUNT, shrink=False)
