"""Who decides where PRO-VPT moves a prompt: a small PPO policy, or Thompson sampling.

Both are a few thousand fp32 numbers on the CPU that answer once per epoch. They draw from (seed,
number of choices so far) alone, so the ranks of a data-parallel run agree and a resumed run goes on
as the uninterrupted one would. `state` and `load_state` carry everything through a checkpoint, in
tensors whose shapes never change.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 64


class PPOPolicy:
    """Proximal policy optimisation over `depth` actions, from states of 3 depth numbers.

    Actor 3 depth - 64 - 64 - depth and critic 3 depth - 64 - 64 - 1, tanh between the layers (at
    depth 12: 7308 and 6593 parameters). After every 2 rewards, 60 steps of Adam (actor 3e-4, critic
    1e-3) on

        -min(r A, clip(r, 0.8, 1.2) A) + 0.5 (V - R)^2 - 0.01 entropy,    A = R - V_old,

    r the ratio of new to old probability, R the undiscounted sum of the buffer's rewards from that
    move on, standardised over the buffer: of two returns only the order is left, +-0.71. Steps with
    a loss that is not finite are left out.

    Args:
        depth: number of blocks.
        seed: of the initial weights and of every draw.
    """

    REWARDS = 2
    STEPS = 60
    CLIP = 0.2
    VALUE_WEIGHT = 0.5
    ENTROPY_WEIGHT = 0.01
    ACTOR_RATE = 3e-4
    CRITIC_RATE = 1e-3

    def __init__(self, depth: int, seed: int) -> None:
        self.seed, self.choices, self.rewards_seen = seed, 0, 0
        generator = torch.Generator().manual_seed(seed)
        self.nets = {
            "actor": _Perceptron((3 * depth, HIDDEN, HIDDEN, depth), generator),
            "critic": _Perceptron((3 * depth, HIDDEN, HIDDEN, 1), generator),
        }
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.nets["actor"].weights], "lr": self.ACTOR_RATE},
                {"params": [self.nets["critic"].weights], "lr": self.CRITIC_RATE},
            ]
        )
        self.memory = {
            "states": torch.zeros(self.REWARDS, 3 * depth, dtype=torch.float32),
            "actions": torch.zeros(self.REWARDS, dtype=torch.int64),
            "log_probs": torch.zeros(self.REWARDS, dtype=torch.float32),
            "values": torch.zeros(self.REWARDS, dtype=torch.float32),
            "rewards": torch.zeros(self.REWARDS, dtype=torch.float32),
        }

    @torch.no_grad()
    def choose(self, state: Tensor) -> int:
        """A block, drawn with the actor's probabilities for `state` (3 depth,) fp32."""
        log_probs = self.nets["actor"](state).log_softmax(0)
        draw = np.random.default_rng((self.seed, self.choices)).random()
        cumulative = log_probs.double().exp().cumsum(0)
        action = int((cumulative < draw * cumulative[-1]).sum())
        self.choices += 1
        at = self.rewards_seen
        self.memory["states"][at] = state
        self.memory["actions"][at] = action
        self.memory["log_probs"][at] = log_probs[action]
        self.memory["values"][at] = self.nets["critic"](state)[0]
        return action

    def reward(self, value: float) -> None:
        """What the last choice earned; the second reward starts an update."""
        self.memory["rewards"][self.rewards_seen] = value
        self.rewards_seen += 1
        if self.rewards_seen == self.REWARDS:
            self._update()
            self.rewards_seen = 0

    @torch.enable_grad()
    def _update(self) -> None:
        returns = self.memory["rewards"].flip(0).cumsum(0).flip(0)
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        advantages = returns - self.memory["values"]
        for _ in range(self.STEPS):
            loss = self._loss(returns, advantages)
            if not torch.isfinite(loss):
                continue
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _loss(self, returns: Tensor, advantages: Tensor) -> Tensor:
        """The scalar of one step, from the moves in memory; both arguments (REWARDS,)."""
        actions = self.memory["actions"][:, None]
        log_probs = self.nets["actor"](self.memory["states"]).log_softmax(1)
        values = self.nets["critic"](self.memory["states"])[:, 0]
        ratios = (log_probs.gather(1, actions)[:, 0] - self.memory["log_probs"]).exp()
        clipped = ratios.clamp(1 - self.CLIP, 1 + self.CLIP)
        gain = torch.minimum(ratios * advantages, clipped * advantages).mean()
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        loss = self.VALUE_WEIGHT * F.mse_loss(values, returns)
        return loss - gain - self.ENTROPY_WEIGHT * entropy

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, by name: CPU tensors of constant shapes."""
        tensors = dict(self.memory)
        tensors["counters"] = torch.tensor([self.choices, self.rewards_seen])
        for name, net in self.nets.items():
            adam = self.optimizer.state.get(net.weights, {})
            tensors[name] = net.weights.detach()
            tensors[f"{name}_steps"] = adam.get("step", torch.zeros((), dtype=torch.float32))
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}_{moment}"] = adam.get(moment, torch.zeros_like(net.weights))
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in self.memory.items():
            tensor.copy_(tensors[name])
        self.choices, self.rewards_seen = tensors["counters"].tolist()
        for name, net in self.nets.items():
            net.weights.copy_(tensors[name])
            self.optimizer.state[net.weights] = {
                "step": tensors[f"{name}_steps"].clone(),
                "exp_avg": tensors[f"{name}_exp_avg"].clone(),
                "exp_avg_sq": tensors[f"{name}_exp_avg_sq"].clone(),
            }


class ThompsonPolicy:
    """Thompson sampling: the block whose draw from Beta(successes + 1, failures + 1) is largest.

    A reward of at least 0 is a success of the block chosen last. States are not looked at.
    """

    def __init__(self, depth: int, seed: int) -> None:
        self.seed, self.choices, self.last = seed, 0, 0
        self.outcomes = torch.zeros(depth, 2, dtype=torch.int64)  # successes, failures

    def choose(self, state: Tensor) -> int:
        """A block."""
        successes, failures = (self.outcomes.numpy() + 1).T
        draws = np.random.default_rng((self.seed, self.choices)).beta(successes, failures)
        self.choices += 1
        self.last = int(draws.argmax())
        return self.last

    def reward(self, value: float) -> None:
        """What the last choice earned."""
        self.outcomes[self.last, 0 if value >= 0 else 1] += 1

    def state(self) -> dict[str, Tensor]:
        """As `PPOPolicy.state`."""
        counters = torch.tensor([self.choices, self.last])
        return {"counters": counters, "outcomes": self.outcomes.clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """As `PPOPolicy.load_state`."""
        self.choices, self.last = tensors["counters"].tolist()
        self.outcomes.copy_(tensors["outcomes"])


POLICIES: dict[str, type[PPOPolicy] | type[ThompsonPolicy]] = {
    "ppo": PPOPolicy,
    "thompson": ThompsonPolicy,
}


class _Perceptron:
    """Linear layers with tanh between them, their parameters in one flat leaf tensor.

    Each layer starts as `nn.Linear` does: U(-b, b), b = 1 / sqrt(inputs).
    """

    def __init__(self, sizes: tuple[int, ...], generator: torch.Generator) -> None:
        self.shapes = [shape for a, b in pairwise(sizes) for shape in ((b, a), (b,))]
        inputs = [a for a in sizes[:-1] for _ in range(2)]
        parts = [
            torch.empty(torch.Size(shape).numel(), dtype=torch.float32).uniform_(
                -(n**-0.5), n**-0.5, generator=generator
            )
            for shape, n in zip(self.shapes, inputs)
        ]
        self.weights = torch.cat(parts).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        parts = self.weights.split([torch.Size(s).numel() for s in self.shapes])
        layers = [part.view(shape) for part, shape in zip(parts, self.shapes)]
        for i in range(0, len(layers), 2):
            x = F.linear(x if i == 0 else x.tanh(), layers[i], layers[i + 1])
        return x
