"""PRO-VPT: VPT-deep whose prompts move between blocks while they are trained.

Source: Shang et al., "Iterative Prompt Relocation for Distribution-Adaptive Visual Prompt Tuning"
(arXiv 2503.06901, ICCV 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import (
    BackboneShape,
    check_choice,
    check_count,
    check_flag,
    check_prompts,
    sum_over_ranks,
)
from .registry import register
from .relocation import POLICIES
from .vpt import VPTDeep

SWEEPS = ("extra", "reuse")
SCORES = ("taylor", "norm")
SHRINK = 1e-3  # what a prompt is multiplied by when it moves
CLIP_NORM = 0.25  # of the released scoring pass


class Move(NamedTuple):
    """One decision: bank row `row`, of idleness `score`, from block `source` to `target`."""

    row: int
    source: int
    target: int
    score: float


@register("pro-vpt")
class ProVPT(VPTDeep):
    """VPT-deep with a fixed number of prompts in all and a moving number per block.

    Once per epoch, from the second on, the most idle prompt of the whole network leaves its block,
    and a policy chooses the block it goes to. `start_of_epoch` does that; a training loop calls it
    before every epoch (never in the middle of one that is resumed), and `end_of_step` after every
    step:

        def losses():
            for images, labels in loader:
                yield F.cross_entropy(pae.fast_forward(model, images), labels), len(labels)

        model.prompts.start_of_epoch(losses, list(model.head.parameters()), mean_loss_of_last_epoch)

    Idleness I_k = L(P) - L(P without p_k) is taken to first order in a gate g_k = 1 on the prompt:
    dL/dg_k = <dL/dp_k, p_k>. The gates are the constant 1 (released: parameters that the optimiser
    holds), and their gradient is one dot product per prompt in the prompts' own backward. A prompt
    moves only if the largest score is positive. It is multiplied by 1e-3, keeps its row in the bank
    and with it its optimiser state, and becomes the last of its new block; when the policy chooses
    the block it is in, nothing changes. Policy and rewards: `pae/prompts/relocation.py`; its
    state is (block sums of the scores, standardised with the population deviation | counts after
    the removal, of sum 1 | one-hot source block); the reward of a move, known one epoch later, is
    L_before - L_now - max_k I_k.

    The released loop also clips the gradients of head and prompts together to norm 0.25 in every
    training step, and decays the head's bias too: that is the loop's part, `clip_grad_norm_` and
    the optimiser's groups. Its learning rate of 2.5 without a schedule is meant with the clip.

    What the score sees. A deep prompt is read through a LayerNorm alone, which takes its length
    out: dL/dg_k = eps / (var_k + eps) <dL/dy_k, y_k> with y_k the normalised row. At eps 1e-6 and
    VPT's initial variance 1.3e-3 that is a thousandth of <dL/dy_k, y_k>, while a prompt that has
    just moved has variance 1e-9 and counts in full. So the released criterion looks first at
    prompts that moved lately. This follows from the definition and is kept.

    The extra pass takes as long as an epoch of training, the gates of "reuse" next to nothing. When
    prompts change much within an epoch, "reuse" is another criterion, not an approximation.
    `bench/results/prompt_scores.md` compares the two.

    Args:
        num_tokens: prompts per block at first: one integer, or one per block (0 allowed, not all).
        dropout, dropout_scope: as in `VPTDeep`; released: 0.1, "sample".
        sweep: "extra" scores in a pass of its own over the training data before every epoch, which
            about doubles the time of training; "reuse" sums the gates' gradients over the training
            steps of the epoch before, which is free but measures prompts while they change. Then
            `end_of_step` counts the steps, `last_loss` is needed, and fp16 loss scaling would
            scale the scores.
        score: "taylor", or "norm": minus the share of the prompt's L2 norm in its block's (always
            moves one; no max_k I_k in the reward). The policy's state then has the sum of the norms
            of each block, as the shares sum to -1 in all. The released "norm" gives these scores
            and this first state, and then stops with an error: at the first move to another block
            (it scales a leaf in place), or else at the first reward (its earlier loss is never
            set). What follows here is the rule of "taylor".
        allocation: "ppo" or "thompson" (a success is a reward of at least 0).
        faithful: score as the released code does: dropout as in training; in every batch the
            gates' and the head's gradients clipped together to norm 0.25; L the sum over
            batches of their mean loss / batch size; and a pass ahead of the first epoch too, which
            moves nothing (it takes time and random numbers). Otherwise no dropout, no clipping, L
            and the scores are means over the images, and the first epoch only trains. Needs sweep
            "extra" and score "taylor".
        seed: of the policy.

    Attributes:
        tokens: (S, D), the bank; its rows never change place.
        table: (S,) int64, bank rows block after block; edited in place, so captured CUDA graphs
            read moves, but the number of rows per block is part of a capture: call
            `pae.graphed_step` again (after `start_of_epoch`) when `prompt_counts` have changed; a
            replay with other counts is refused.
        idleness: (S,) fp64 scores of the bank's rows at the last decision, or None.
        last_move: the last `Move`, or None.

    The table, the policy and all that a decision needs are part of the model's `state_dict` and
    checkpoints. In data-parallel training every rank scores its share and all decide alike; a state
    to go on from in the middle of an epoch has each rank's `rank_state` too (sweep "reuse").

    KLD is refused: it pairs prompt j of one block with prompt j of the next, and a move breaks the
    pairs. MPA works, before training.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    moves_prompts = True
    training_arguments = (
        *VPTDeep.training_arguments,
        *("sweep", "score", "faithful", "seed"),
    )

    def __init__(
        self,
        num_tokens: int | Sequence[int],
        dropout: float = 0.0,
        dropout_scope: str = "batch",
        sweep: str = "extra",
        score: str = "taylor",
        allocation: str = "ppo",
        faithful: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tokens, dropout, dropout_scope)
        self.sweep = check_choice("sweep", sweep, SWEEPS)
        self.score = check_choice("score", score, SCORES)
        self.allocation = check_choice("allocation", allocation, POLICIES)
        if check_flag("faithful", faithful) and (sweep, score) != ("extra", "taylor"):
            raise ValueError(
                "faithful must be False unless sweep is 'extra' and score 'taylor', the released "
                f"scoring pass; got sweep {sweep!r}, score {score!r}"
            )
        self.faithful = faithful
        self.seed = check_count("seed", seed)
        self.register_buffer("table", None)
        self.idleness: Tensor | None = None
        self.last_move: Move | None = None
        # the table that `_counts` belong to, its version and its entries
        self._known_table: tuple[Tensor, int, list[int]] | None = None
        self._gates: Tensor | None = None  # ones; their gradient is the score
        self._epoch = 0  # epochs begun
        self._steps = 0  # of this epoch
        self._previous_loss = 0.0
        self._awaits_reward = False

    def bind(self, shape: BackboneShape) -> None:
        counts = self._counts_of(shape.depth)
        if sum(counts) == 0:
            raise ValueError(f"num_tokens must give at least one prompt, got {self.num_tokens}")
        self._allocate(shape, sum(counts))
        self._counts = counts
        self.table = torch.arange(sum(counts))
        self._know_table()
        self.policy = POLICIES[self.allocation](shape.depth, self.seed)

    # ---- prompts

    @property
    def prompt_counts(self) -> list[int]:
        """As of every family.

        Raises:
            RuntimeError: the table is another than `_counts` belong to: averages of models
                (`AveragedModel`, timm's `ModelEma`) copy the one and not the other.
        """
        known, table = self._known_table, self.table
        if known is None or torch.compiler.is_compiling() or _has_no_trace(table):
            return list(self._counts)
        if known[0] is not table or known[1] != table._version:
            if table.tolist() != known[2]:
                raise RuntimeError(
                    "ProVPT.table was written by something else than a move or a whole state "
                    "(averages of models copy it without the counts of the blocks): average no "
                    "model whose prompts move, or load a state_dict with load_state_dict"
                )
            self._known_table = table, table._version, known[2]
        return list(self._counts)

    def _know_table(self) -> None:
        """The table is the one of the counts."""
        table = self.table
        self._known_table = None
        if not _has_no_trace(table):
            self._known_table = table, table._version, table.tolist()

    def raw_prompts(self) -> list[Tensor | None]:
        return list(self.tokens.index_select(0, self.table).split(self._counts))

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        count, start = self._counts[index], sum(self._counts[:index])
        if count == 0:
            return None
        return self._drop(self._gated().index_select(0, self.table[start : start + count]), x)

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        blocks = self._gated().index_select(0, self.table).split(self._counts)
        return self._drop_each(blocks, x)

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        check_prompts("prompts", prompts, self._counts, self.tokens.shape[-1])
        rows = torch.cat([p for p in prompts if p is not None])
        with torch.no_grad():
            self.tokens[self.table] = rows.to(self.tokens)

    def _gated(self) -> Tensor:
        if self._gates is None or not self.training:
            return self.tokens
        return self.tokens * self._gates[:, None].to(self.tokens.dtype)

    def _new_gates(self) -> Tensor:
        wide = torch.promote_types(self.tokens.dtype, torch.float32)  # an epoch's sum gathers here
        return torch.ones(len(self.tokens), dtype=wide, device=self.tokens.device).requires_grad_()

    # ---- once per epoch

    def start_of_epoch(
        self,
        losses: Callable[[], Iterable[tuple[Tensor, int]]],
        head: Sequence[Tensor] = (),
        last_loss: float | None = None,
    ) -> None:
        """Score, reward the last move, move one prompt; see `PromptFamily.start_of_epoch`.

        Raises:
            ValueError: `losses` gave no batch; `last_loss` is None where sweep is "reuse"; `head`
                is empty where faithful is True.
            RuntimeError: sweep is "reuse" and `end_of_step` was not called since the last epoch.
        """
        if self._epoch > 0:
            self._decide(*self._measure(losses, head, last_loss))
        elif self.faithful:  # the first epoch is scored, and nothing comes of it
            self.idleness = self._measure(losses, head, last_loss)[0]
        self._epoch += 1
        self._steps = 0
        if self.sweep == "reuse" and self.score == "taylor":
            if self._gates is None or self._gates.device != self.tokens.device:
                self._gates = self._new_gates()
            if self._gates.grad is None:
                self._gates.grad = torch.zeros_like(self._gates)
            self._gates.grad.zero_()  # in place: a captured step adds to this very tensor

    def end_of_step(self) -> None:
        self._steps += 1

    def move(self, row: int, target: int) -> None:
        """Put bank row `row` at the end of block `target`, times 1e-3; nothing if it is there."""
        order = self.table.tolist()
        at = order.index(row)
        source = self._block_of_place(at)
        if source == target:
            return
        del order[at]
        self._counts[source] -= 1
        order.insert(sum(self._counts[: target + 1]), row)
        self._counts[target] += 1
        with torch.no_grad():
            self.table.copy_(torch.tensor(order))
            self.tokens[row].mul_(SHRINK)
        self._know_table()

    def _block_of_place(self, place: int) -> int:
        for block, count in enumerate(self._counts):
            if place < count:
                return block
            place -= count
        raise IndexError(place)

    def _measure(
        self,
        losses: Callable[[], Iterable[tuple[Tensor, int]]],
        head: Sequence[Tensor],
        last_loss: float | None,
    ) -> tuple[Tensor, float]:
        """Idleness (S,) in fp64 on the CPU, and the loss to compare with the epoch before's."""
        if self.faithful and not head:
            raise ValueError(
                "head must hold the head's trained parameters where faithful is True: they are "
                "clipped together with the gates; got none"
            )
        if self.score == "norm":
            shares = torch.cat([-n / n.sum() for n in self._norms()])
            norm_scores = torch.empty_like(shares).index_copy_(0, self.table.cpu(), shares)
        if self.sweep == "extra":
            scores, loss = self._pass(losses, head)
            return norm_scores if self.score == "norm" else scores, loss
        if last_loss is None:
            raise ValueError(
                "last_loss must be the mean training loss of the epoch before, because sweep "
                "'reuse' measures none, got None"
            )
        if self.score == "norm":
            return norm_scores, last_loss
        if self._steps == 0 or self._gates is None or self._gates.grad is None:
            raise RuntimeError(
                "end_of_step must be called after every step where sweep is 'reuse'; it was not "
                "called since the last start_of_epoch"
            )
        grad = self._gates.grad
        *sums, ranks = sum_over_ranks(torch.cat([grad, grad.new_ones(1)])).tolist()
        return torch.tensor(sums, dtype=torch.float64) / (ranks * self._steps), last_loss

    def _norms(self) -> list[Tensor]:
        """L2 norms of the prompts of each block, in fp64 on the CPU."""
        norms = self.tokens.detach().index_select(0, self.table).double().norm(dim=1).cpu()
        return list(norms.split(self._counts))

    def _pass(
        self,
        losses: Callable[[], Iterable[tuple[Tensor, int]]],
        head: Sequence[Tensor] = (),
    ) -> tuple[Tensor, float]:
        """Scores and loss of one pass over the training data at frozen parameters."""
        scoring = self.score == "taylor"
        head = [p for p in head if p.requires_grad]
        before = self.training, self.dropout, self._gates
        self.train()
        self.dropout = self.dropout if self.faithful else 0.0
        self._gates = gates = self._new_gates()
        total, weights = gates.new_zeros(len(gates) + 1), 0  # scores and loss
        try:
            with torch.set_grad_enabled(scoring):
                for loss, images in losses():
                    grad, weight = torch.zeros_like(gates), images
                    if self.faithful:
                        grad, *others = torch.autograd.grad(loss, [gates, *head])
                        norm = torch.stack([g.to(grad).norm() for g in (grad, *others)]).norm()
                        grad = grad * (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
                        loss, weight = loss / images, 1
                    elif scoring:
                        (grad,) = torch.autograd.grad(loss, gates)
                    total += weight * torch.cat([grad, loss.detach()[None].to(grad)]).detach()
                    weights += weight
        finally:
            self.train(before[0])
            self.dropout, self._gates = before[1:]
        if weights == 0:
            raise ValueError("losses must give at least one batch, got none")
        sums = sum_over_ranks(torch.cat([total, total.new_tensor([weights])]))
        *scores, loss, weights = sums.tolist()
        scores = torch.tensor(scores, dtype=torch.float64) / weights
        return scores, loss if self.faithful else loss / weights

    def _decide(self, scores: Tensor, loss: float) -> None:
        """Reward the last move with what came of it, then move the most idle prompt."""
        self.idleness, self.last_move = scores, None
        row = int(scores.argmax())
        worst = float(scores[row])
        if self._awaits_reward:
            left = worst if self.score == "taylor" else 0.0
            self.policy.reward(self._previous_loss - loss - left)
        self._previous_loss = loss
        self._awaits_reward = self.score == "norm" or worst > 0
        if self._awaits_reward:
            source = self._block_of_place(self.table.tolist().index(row))
            target = self.policy.choose(self._policy_state(scores, source))
            self.last_move = Move(row, source, target, worst)
            self.move(row, target)

    def _policy_state(self, scores: Tensor, source: int) -> Tensor:
        """(3 depth,) fp32: standardised block scores | counts after the removal | source."""
        blocks = scores[self.table.cpu()].split(self._counts)
        if self.score == "norm":  # the shares of a block sum to -1
            blocks = self._norms()
        sums = torch.stack([rows.sum() for rows in blocks])
        sums = (sums - sums.mean()) / (sums.std(correction=0) + 1e-8)
        counts = torch.tensor(self._counts, dtype=torch.float64)
        counts[source] -= 1
        hot = torch.zeros_like(counts)
        hot[source] = 1
        return torch.cat([sums, counts / counts.sum().clamp(min=1), hot]).float()

    # ---- checkpoints

    def _host_state(self) -> dict[str, Tensor]:
        """What is no parameter and lives on the host, as tensors of constant shapes."""
        return {
            "counts": torch.tensor(self._counts),
            "epoch": torch.tensor(self._epoch),
            "steps": torch.tensor(self._steps),
            "previous_loss": torch.tensor(self._previous_loss, dtype=torch.float64),
            "awaits_reward": torch.tensor(self._awaits_reward),
            "score_sum": self._score_sum(),
            **{f"policy.{name}": tensor for name, tensor in self.policy.state().items()},
        }

    def _score_sum(self) -> Tensor:
        """(S,) fp64: the gates' gradients of this process, summed over the epoch so far."""
        if self._gates is None or self._gates.grad is None:
            return torch.zeros(len(self.tokens), dtype=torch.float64)
        return self._gates.grad.double().cpu()

    def rank_state(self) -> dict[str, Tensor]:
        """The sum of this process's scores: `state_dict` has one process's, a move needs all."""
        return {"score_sum": self._score_sum()}

    def load_rank_state(self, state: Mapping[str, Tensor]) -> None:
        if self._gates is not None:
            self._gates.grad = state["score_sum"].to(self._gates)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._host_state().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        own = self._host_state()
        names = {prefix + name: name for name in own}
        unexpected[:] = [key for key in unexpected if key not in names]
        found = {name: state_dict[key].cpu() for key, name in names.items() if key in state_dict}
        if absent := [prefix + name for name in own if name not in found]:
            if len(absent) < len(own) or strict:
                missing.extend(absent)
            return
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                errors.append(
                    f"size mismatch for {prefix + name}: {tuple(tensor.shape)} in the state, "
                    f"{tuple(own[name].shape)} in the model"
                )
                return
        self._counts = found["counts"].tolist()
        self._know_table()
        self._epoch, self._steps = int(found["epoch"]), int(found["steps"])
        self._previous_loss = float(found["previous_loss"])
        self._awaits_reward = bool(found["awaits_reward"])
        self._gates = None
        if self.sweep == "reuse" and self.score == "taylor" and self._epoch > 0:
            self._gates = self._new_gates()
            self._gates.grad = found["score_sum"].to(self._gates)
        policy = {n: t for n, t in found.items() if n.startswith("policy.")}
        self.policy.load_state({n.removeprefix("policy."): t for n, t in policy.items()})


def _has_no_trace(table: Tensor) -> bool:
    """Whether nobody can say if it was written."""
    return table.is_inference() or table.device.type == "meta"
