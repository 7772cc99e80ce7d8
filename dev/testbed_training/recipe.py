"""How the testbed's models are trained: phases, learning rates, and the one recipe all three families share.

Retrieval from the context is what a small model learns last. It comes early when copying is learnt first, on repeated
words, and then used on short texts with many answers each; length is added when retrieval works.
"""

from __future__ import annotations

from dataclasses import dataclass

REPEAT = "repeat"
"""The exercise that is no task: random words, then the same words again."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one range of context lengths and one mixture of tasks."""

    steps: int
    """Optimizer steps of this phase."""
    tokens: int
    """Tokens per step, padding included."""
    context_tokens: tuple[int, int]
    """Range from which each batch draws its context length."""
    bare: float
    """Share of the prompts that go without their template's instructions."""
    lr: float
    """Learning rate, relative to the recipe's."""
    weights: dict[str, float]
    """Task mixture, and the share of `REPEAT`."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, except family and seed."""

    phases: tuple[Phase, ...]
    muon_lr: float = 0.01
    """Peak learning rate of the hidden matrices."""
    adamw_lr: float = 3e-3
    """Peak learning rate of embeddings, norms and biases."""
    query_key_std: float = 0.08
    """Initial standard deviation of the query and key projections, which start equal."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: float = 0.3
    """Last share of the steps, over which the learning rate falls linearly to 2 % of its peak."""

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that step `step` (from 0) belongs to."""
        end = 0
        for phase in self.phases:
            end += phase.steps
            if step < end:
                return phase
        raise ValueError(f"the recipe has {end} steps, there is no step {step}")

    def lr_scale(self, step: int) -> float:
        """Learning rate at a step, relative to its peak."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.phase_at(step).lr * min(1.0, (step + 1) / self.warmup, max(0.02, left))


MIXTURE = {"multifieldqa_en": 3.0, "triviaqa": 2.0, "trec": 2.0, "gov_report": 1.0, "multi_news": 1.0, "qasper": 0.3}
RECIPE = Recipe(
    phases=(
        Phase(steps=300, tokens=1024, context_tokens=(16, 40), bare=1.0, lr=1.0, weights={REPEAT: 1.0}),
        Phase(steps=300, tokens=2048, context_tokens=(20, 80), bare=0.9, lr=0.5, weights={**MIXTURE, REPEAT: 0.5}),
        Phase(steps=500, tokens=2048, context_tokens=(60, 250), bare=0.7, lr=0.5, weights=MIXTURE),
        Phase(steps=500, tokens=3072, context_tokens=(250, 640), bare=0.3, lr=0.5, weights=MIXTURE),
        Phase(steps=400, tokens=4096, context_tokens=(480, 640), bare=0.0, lr=0.5, weights=MIXTURE),
    )
)
