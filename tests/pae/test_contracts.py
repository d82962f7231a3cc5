"""Nothing a family answers is ignored: what it overrides is asked by both engines, and what would
never be asked, or contradicts another part, is refused in one line that says what to do.
"""

import pytest
import torch

import pae
from pae.prompts import METHODS, PromptFamily, VPTDeep, VPTShallow, contracts
from tests import tiny
from tests.tiny import assert_engines_agree, family, prompted, refused


def rows(self, index, x, *more):
    return x


# ---- what is overridden is asked


class Counting:
    """Which questions were asked, of which blocks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []


class Adjusts(Counting, VPTDeep):
    def adjust_rows(self, index, x):
        self.asked.append(("adjust_rows", index))
        return x * 2


class Attends(Counting, VPTDeep):
    def adjust_attended_rows(self, index, x, class_attention):
        self.asked.append(("adjust_attended_rows", index))
        return x + class_attention.sum()


class Both(Adjusts, Attends):
    """The one behind the other."""


class Rewrites(Counting, VPTShallow):
    def next_rows(self, index, rows, x):
        self.asked.append(("next_rows", index))
        return rows * 2


class Observes(Counting, VPTDeep):
    observed = frozenset({0, 2})

    def observe(self, index, x, class_query):
        self.asked.append(("observe", index))


@pytest.mark.parametrize(
    "kind, expected",
    [
        (Adjusts, [("adjust_rows", 1), ("adjust_rows", 2)]),
        (Attends, [("adjust_attended_rows", 1), ("adjust_attended_rows", 2)]),
        (
            Both,
            [(q, i) for i in (1, 2) for q in ("adjust_rows", "adjust_attended_rows")],
        ),
        (Rewrites, [("next_rows", 1), ("next_rows", 2)]),
        (Observes, [("observe", 0), ("observe", 2)]),
    ],
)
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_a_method_is_asked_without_a_flag(kind, expected, engine):
    model = prompted("plain", kind(3))
    model.prompts.asked.clear()
    model(tiny.images(model.backbone), engine=engine)
    assert model.prompts.asked == expected


def test_engines_agree_on_both_kinds_of_adjusted_rows():
    model = prompted("registers", Both(3))
    assert_engines_agree(model, tiny.images(model.backbone))


def test_an_instance_may_leave_its_part_out():
    made = Adjusts(3)
    made.adjusts_rows = False
    model = prompted("plain", made)
    model(tiny.images(model.backbone), engine="fast")
    assert not model.prompts.asked


def test_own_block_prompts_are_not_passed_over():
    """A subclass that overrides `block_prompts` alone does not inherit the batched version."""

    class Louder(VPTDeep):
        def block_prompts(self, index, x):
            return self.tokens[index].flip(1)

    model = prompted("plain", Louder(3))
    assert_engines_agree(model, tiny.images(model.backbone))
    plain = prompted("plain", VPTDeep(3))
    x = tiny.images(model.backbone)
    assert tiny.error(pae.fast_forward(model, x), pae.fast_forward(plain, x)) > 1e-3


# ---- what a class may not be


CONTRADICTIONS = [
    (
        family(adjusts_rows=True),
        "Mine.adjusts_rows is True and adjust_rows is not overridden: override it",
    ),
    (
        family(reads_class_attention=True, adjust_rows=rows),
        "Mine.reads_class_attention is True and adjust_attended_rows is not overridden",
    ),
    (
        family(VPTShallow, rewrites_rows=True),
        "Mine.rewrites_rows is True and next_rows is not overridden",
    ),
    (
        family(adjusts_rows=False, adjust_rows=rows),
        "Mine.adjusts_rows is False and adjust_rows is overridden, so it would not be asked",
    ),
    (
        family(next_rows=rows),
        "Mine.next_rows would never be asked, because enters_sequence is False and no rows live "
        "on: set enters_sequence = True in the class",
    ),
    (
        family(observe=rows),
        "Mine.observe would never be asked, because observed names no block: set it to a frozenset",
    ),
    (
        family(observe=rows, observed=frozenset()),
        "Mine.observe would never be asked, because observed names no block",
    ),
    (
        family(observed=frozenset({1})),
        "Mine.observed names blocks and observe is not overridden: override it",
    ),
    (
        family(observed={1}, observe=rows),
        "Mine.observed must be a frozenset of block indices, or a property that returns one",
    ),
    (
        family(depends_on_input=True, all_prompts=lambda self, x: []),
        "Mine.all_prompts would never be asked, because depends_on_input is True",
    ),
    (
        family(VPTShallow, all_prompts=lambda self, x: []),
        "Mine.all_prompts would never be asked, because enters_sequence is True",
    ),
    (
        family(all_prompts=lambda self, x: [], head_keys_values=rows),
        "Mine.all_prompts would never be asked, because head_keys_values is overridden",
    ),
    (
        family(VPTShallow, head_keys_values=rows),
        "Mine.head_keys_values would never be asked, because enters_sequence is True",
    ),
    (
        family(VPTShallow, group_index=lambda self, x: None),
        "Mine.group_index would never be asked, because enters_sequence is True: give rows",
    ),
    (
        family(moves_prompts=True),
        "Mine.moves_prompts is True and nothing moves them: override one of start_of_epoch",
    ),
    (family(depends_on_input=1), "Mine.depends_on_input must be True or False, got 1"),
    (
        family(adjust_rows=lambda self, index, x, class_attention: x),
        "Mine.adjust_rows must take (self, index, x), got (self, index, x, class_attention); "
        "adjust_attended_rows is the question that brings the class attention",
    ),
    (
        family(see_labels=lambda self: None),
        "Mine.see_labels must take (self, labels), got (self)",
    ),
    (
        family(start_of_epoch=lambda self, losses: None),
        "Mine.start_of_epoch must take (self, losses, head, last_loss), got (self, losses)",
    ),
]


@pytest.mark.parametrize(
    "make, message", CONTRADICTIONS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_contradiction_is_refused_when_the_class_is_made(make, message):
    refused(TypeError, message, make)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("adjust_row", "adjust_rows"),
        ("ajust_rows", "adjust_rows"),
        ("adjsut_rows", "adjust_rows"),
        ("adjust_attended_row", "adjust_attended_rows"),
        ("end_of_epochs", "end_of_epoch"),
        ("epoch_end", "end_of_epoch"),
        ("on_step_end", "end_of_step"),
        ("start_epoch", "start_of_epoch"),
        ("obseve", "observe"),
        ("penalties", None),
        ("penaltty", "penalty"),
        ("block_prompt", "block_prompts"),
        ("head_key_values", "head_keys_values"),
        ("see_label", "see_labels"),
        # what is close and means something else
        ("new_rows", None),
        ("set_labels", None),
        ("max_prompts", None),
        ("move_prompts", None),
        ("rewound", None),
        ("_adjust_row", None),
    ],
)
def test_a_method_under_nearly_the_name_of_a_question(name, meant):
    make = family(**{name: rows})
    if meant is None:
        assert make().__name__ == "Mine"
        return
    refused(TypeError, f"Mine.{name} resembles {meant}, and nothing asks for it under this", make)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("depend_on_input", "depends_on_input"),
        ("read_class_attention", "reads_class_attention"),
        ("enters_sequences", "enters_sequence"),
        ("observes", "observed"),
        ("num_things", None),
    ],
)
def test_a_flag_under_nearly_the_name_of_another(name, meant):
    make = family(**{name: True})
    if meant is None:
        assert make().num_things
        return
    refused(TypeError, f"Mine.{name} resembles {meant}", make)


def test_shipped_families_say_nothing_that_follows_from_their_methods():
    for made in METHODS.values():
        for flag, method in contracts.DERIVED.items():
            assert getattr(made, flag) == (
                getattr(made, method) is not getattr(PromptFamily, method)
            )


# ---- what only an instance shows


class Reads(VPTDeep):
    """Rows that read x, unannounced; `how` they do."""

    def __init__(self, num_tokens, how):
        super().__init__(num_tokens)
        self.how = how

    def block_prompts(self, index, x):
        own = self.tokens[index]
        if self.how == "zero":
            return own + 0 * x.mean()
        if self.how == "sign":
            return own if x[0, 0, 0] > 10 or x.isnan().any() else own + 1
        return own[None] + x[:, :1]

    def head_keys_values(self, index, x):
        return None


class ReadsInHeads(VPTDeep):
    def head_keys_values(self, index, x):
        heads = x[:, 0].unflatten(-1, (4, 8))
        return torch.stack([heads, heads], 1)[:, None]


class ReadsForGroups(tiny.Given):
    def group_index(self, x):
        return (x[:, 0, 0] > 0).long()


@pytest.mark.parametrize("how", ["sum", "zero", "sign"])
def test_values_of_x_are_read_unannounced(how):
    refused(
        TypeError,
        "Reads.block_prompts(0) reads the values of x, and depends_on_input is False: set "
        "depends_on_input = True",
        lambda: prompted("plain", Reads(3, how)),
    )


def test_values_of_x_are_read_unannounced_elsewhere():
    refused(
        TypeError,
        "ReadsInHeads.head_keys_values(0) reads the values of x",
        lambda: prompted("plain", ReadsInHeads(3)),
    )
    refused(
        TypeError,
        "ReadsForGroups.group_index reads the values of x",
        lambda: prompted("plain", ReadsForGroups([2, 2, 2], sets=2)),
    )


class Miscounts(VPTDeep):
    @property
    def prompt_counts(self):
        return [4, 4, 4]


class MiscountsLive(Miscounts):
    depends_on_input = True

    def block_prompts(self, index, x):
        return self.tokens[index] + x[:, :1]


class Late(VPTShallow):
    @property
    def prompt_counts(self):
        return [self.num_tokens] * 3


class SharedWithGroups(VPTDeep):
    def group_index(self, x):
        return torch.zeros(len(x), dtype=torch.int64)


class SharedWithGroupsLive(SharedWithGroups):
    depends_on_input = True


class Observed(VPTDeep):
    observed = frozenset({1, 3})

    def observe(self, index, x, class_query):
        pass


class TwoVersions(VPTDeep):
    def all_prompts(self, x):
        return [2 * rows for rows in self.tokens]


class OtherRaw(VPTDeep):
    """The batched version is made of other rows than `block_prompts`."""

    def _blocks(self):
        return (self.tokens + 1).unbind(0)


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (
            lambda: Miscounts(3),
            ValueError,
            "Miscounts.block_prompts(0) gives rows (3, 32), and prompt_counts says 4",
        ),
        (
            lambda: Miscounts(0),
            ValueError,
            "Miscounts.block_prompts(0) gives no rows, and prompt_counts says 4",
        ),
        (
            lambda: Late(3),
            ValueError,
            "Late.prompt_counts must be 0 behind block 0 where enters_sequence is True, got",
        ),
        (
            lambda: SharedWithGroups(3),
            ValueError,
            "SharedWithGroups.block_prompts(0) must give rows (G, P, D) where group_index picks",
        ),
        (
            lambda: Observed(3),
            ValueError,
            "Observed.observed must hold indices of the 3 blocks, got 3",
        ),
        (
            lambda: TwoVersions(3),
            TypeError,
            "TwoVersions.all_prompts and block_prompts give block 0 different rows",
        ),
        (
            lambda: OtherRaw(3),
            TypeError,
            "OtherRaw.all_prompts and block_prompts give block 0 different rows",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_answers_that_contradict_each_other(make, kind, message):
    refused(kind, message, lambda: prompted("plain", make()))


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize(
    "make, message",
    [
        (MiscountsLive, "MiscountsLive.block_prompts(0) gives rows (3, 3, 32), and prompt_counts"),
        (SharedWithGroupsLive, "block_prompts(0) must give rows (G, P, D)"),
    ],
)
def test_answers_of_a_forward_that_contradict_each_other(make, message, engine):
    model = prompted("plain", make(3))
    refused(ValueError, message, lambda: model(tiny.images(model.backbone), engine=engine))


def test_a_flag_of_an_instance_without_its_method():
    made = VPTDeep(3)
    made.adjusts_rows = True
    refused(
        TypeError,
        "VPTDeep.adjusts_rows is True and adjust_rows is not overridden",
        lambda: prompted("plain", made),
    )
    late = Rewrites(3)
    late.enters_sequence = False
    refused(TypeError, "Rewrites.next_rows would never be asked", lambda: prompted("plain", late))


def test_looking_at_the_answers_leaves_no_trace():
    """Random numbers, modes and gradients are as they would be without."""
    made = pae.prompts.VFPTDeep(4, 0.5, "hidden", "random", dropout=0.5)
    torch.manual_seed(3)
    model = prompted("plain", made)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    tiny.backbone("plain")
    twin = VPTDeep(4)
    twin.bind(model.view.shape)
    assert torch.equal(torch.rand(1), drawn)
    assert all(module.training for module in made.modules())
    assert all(p.grad is None for p in made.parameters())


def test_a_family_that_was_refused_can_be_tried_again():
    made = pae.prompts.IVPT(4, num_reinforced=100)
    with pytest.raises(ValueError, match="num_reinforced"):
        prompted("plain", made)
    made.num_reinforced = 3
    assert prompted("plain", made).prompts is made


def test_a_family_without_a_model_has_no_shape():
    refused(RuntimeError, "this VPTDeep belongs to no model yet", lambda: VPTDeep(3).shape)


class OwnKeys(PromptFamily):
    """Keys and values (sets, 3, 2, H, d) of every block, and no rows."""

    def __init__(self, sets):
        super().__init__()
        self.sets = sets

    def bind(self, shape):
        size = shape.depth, self.sets, 3, 2, shape.num_heads, shape.head_width
        self.kv = torch.nn.Parameter(torch.randn(size))

    @property
    def prompt_counts(self):
        return [0] * len(self.kv)

    def block_prompts(self, index, x):
        return None

    def head_keys_values(self, index, x):
        return self.kv[index]


@pytest.mark.parametrize("feature", ["plain", "avg"])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OwnKeys(2), "OwnKeys.head_keys_values(0) gives 2 sets (2, 3, 2, 4, 8) for"),
        (lambda: tiny.Given([3] * 3, sets=2), "Given.block_prompts(0) gives 2 sets (2, 3, 32) for"),
        (
            lambda: tiny.Given([3] * 3, sets=2, group=[0, 1]),
            "Given.group_index must give int64 (5,), one per image, got (2,) int64",
        ),
        (
            lambda: tiny.Given([3] * 3, sets=2, group=[True, False, True, True, False]),
            "Given.group_index must give int64 (5,), one per image, got (5,) bool",
        ),
    ],
)
def test_sets_that_are_not_one_for_each_image(make, message, feature):
    """A kernel would read behind the last one."""
    model = prompted(feature, make(), torch.float32)
    x = tiny.images(model.backbone, 5)
    refused(ValueError, message, lambda: model(x, engine="fast"))
    with pytest.raises((RuntimeError, IndexError)):
        model(x)


@pytest.mark.parametrize("group", [[0, 0, 0], [1, 0, 2]])
def test_a_group_index_of_32_bits(group):
    model = prompted("avg", tiny.Given([3] * 3, sets=3, group=group))
    model.prompts.group = model.prompts.group.int()
    assert_engines_agree(model, tiny.images(model.backbone))
