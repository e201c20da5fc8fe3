"""Samples of the adapter's local posterior, by stochastic gradient Langevin dynamics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datablame.errors import UserError
from datablame.extras.perturbed import Perturbed, own_weights

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from datablame.encoding import Encoded
    from datablame.extras.perturbed import Weights
    from datablame.indexing import Engine

    Gradient = Callable[[Weights, Generator], Weights]


@dataclass(frozen=True)
class Langevin(Perturbed):
    """Draws from `p(w) ∝ exp(−nβ L(w) − Σ_b γ_b/2 ‖w_b − w*_b‖²)`, L the mean over rows of their summed losses.

    Kreer et al. 2025 (2509.26544): SGLD around the trained weights w*,
    `w ← w − ε/2 (nβ ∇L_batch(w) + γ (w − w*)) + N(0, ε)`, here with γ and ε of each block (see `sgld`).

    nbeta: nβ, by default n (β = 1, the posterior of the rows themselves).
    gamma: the pull, γ_b over `1/mean(w*_b²)`: 100 alone leaves a weight within a tenth of its block's size.
    step: ε_b times γ_b; the pull alone is forgotten after 2/step steps.
    batch: rows of a step. chains, draws: draws of each chain, `every` steps apart, after `burn` steps.
    """

    chains: int = 4
    draws: int = 5
    burn: int = 20
    every: int = 4
    nbeta: float | None = None
    gamma: float = 100.0
    step: float = 0.1
    batch: int = 8
    seed: int = 0
    kind = "bif"
    gentler = "a larger gamma, or a smaller step"

    def __post_init__(self) -> None:
        for option, least in (("chains", 1), ("draws", 1), ("burn", 0), ("every", 1), ("batch", 1), ("seed", 0)):
            self.check_count(option, least)
        for option, most in (("gamma", sys.float_info.max), ("step", 1.0)):
            self.check_above(option, most)
        if self.nbeta is not None:
            self.check_above("nbeta", sys.float_info.max)
        if self.samples < 2:
            raise UserError("bif: one draw in all has no covariance; use more chains or draws.")

    @property
    def samples(self) -> int:
        """Draws of all chains."""
        return self.chains * self.draws

    @property
    def steps(self) -> int:
        """Of all chains, each of `batch` rows."""
        return self.chains * (self.burn + self.draws * self.every)

    def prepare(self, engine: Engine, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """The chains, one after the other: `steps` of `batch` rows."""
        import torch

        start = own_weights(engine)
        gammas = {b: self.gamma / mean for b, w in start.items() if (mean := float(w.double().square().mean())) > 0}
        gradient = self._gradient(engine, rows)
        kept: dict[str, Tensor] = {}
        for chain in range(self.chains):
            generator = torch.Generator().manual_seed(self.seed * 2**20 + chain)
            found = sgld(start, gradient, gammas, self.step, generator, self.burn, self.draws, self.every)
            for number, weights in enumerate(found, start=chain * self.draws):
                kept |= {f"{number}/{b}": w for b, w in weights.items()}
        return kept

    def _gradient(self, engine: Engine, rows: Sequence[Encoded]) -> Gradient:
        """`nβ ∇L` of `batch` rows drawn without replacement."""
        import torch

        from datablame.blocks import exchanged
        from datablame.capture import NotFinite, capture

        nbeta = len(rows) if self.nbeta is None else self.nbeta

        def gradient(weights: Weights, generator: Generator) -> Weights:
            chosen = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: self.batch].tolist()]
            size = engine.options.batch_tokens
            try:
                with exchanged(engine.blocks, weights):
                    there = capture(engine.loaded.model, chosen, engine.blocks, [], batch_tokens=size)
            except NotFinite as e:
                raise UserError("--extras bif: a chain diverged; use a smaller step, or a larger gamma.") from e
            return {b: nbeta * there[f"gradients/{b}"].mean(dim=0).view_as(w) for b, w in weights.items()}

        return gradient


def sgld(
    start: Mapping[str, Tensor],
    gradient: Gradient,
    gammas: Mapping[str, float],
    step: float,
    generator: Generator,
    burn: int,
    draws: int,
    every: int,
) -> list[Weights]:
    """`draws` states of one chain from `start`, `every` steps apart after `burn` steps.

    `w ← w − ε/2 (gradient(w) + γ (w − start)) + N(0, ε)` in each block, with `ε = step/γ`. On a quadratic, where the
    exact gradient and pull are `A (w − start)`, the covariance is `(A − ε A²/4)⁻¹`, and ε < 4/λ_max(A) is stable.
    A block without a γ stays as it is.
    """
    import torch

    w = {b: x.clone() for b, x in start.items()}
    out: list[Weights] = []
    for t in range(1, burn + draws * every + 1):
        g = gradient(w, generator)
        for b, gamma in gammas.items():
            noise = torch.randn(w[b].shape, generator=generator, dtype=torch.float64).to(w[b].dtype)
            drift = g[b] + gamma * (w[b] - start[b])
            w[b] = w[b] - step / gamma / 2 * drift + (step / gamma) ** 0.5 * noise
        if t > burn and (t - burn) % every == 0:
            out.append(dict(w))
    return out
