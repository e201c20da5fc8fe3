"""The training behind Figure 7: two linear layers without an activation on images, watched along the way.

Inputs `x [n, d]`, white = 1, the last column is 1 (the first layer's bias); first layer `A [h, d]`, second layer
`B [C, h]` with its bias `b [C]`; logits `x (B A)ᵀ + b`, softmax cross-entropy. The product `B A [C, d]` is formed
first, in training, too: with so few classes that is many times cheaper than the hidden layer of every image, and the
same function with the same gradients,

    G = (p − e_y)ᵀ x / n,    dL/dA = Bᵀ G,    dL/dB = G Aᵀ,    dL/db = the column sums of (p − e_y) / n.

So with A = 0 and B = 0 both gradients are exactly 0 for ever, whatever the data: only b moves.

What is kept at a step t, with Δ the change since the initial point:

    parameters  ‖Δθ‖, Frobenius, over A, B and b together
    accuracy    on the test images
    logits      root mean square of Δ logits over test images and classes, each image's mean taken off (softmax does not
                see it)
    kl          mean over test images of KL(p_t ‖ p_0), in nats
    loss        mean cross-entropy on the test images, in nats
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datablame.errors import UserError
from datablame.paper import kept as pieces

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

    from datablame.paper.mnist import Images

VERSION = 1
"""Of what a kept training says; raise it when its numbers change."""
MEASURES = ("parameters", "accuracy", "logits", "kl", "loss")
STARTS = {
    "first": "the first layer random, the second at zero",
    "second": "the second layer random, the first at zero",
    "biases": "both layers' weights at zero, their biases random",
    "zero": "everything at zero",
}
RATIO = 1.03
"""Between the steps that are measured, at least; all of the first 30 or so are."""


@dataclass(frozen=True)
class Setting:
    """start: of STARTS; random: uniform within ±1/√inputs of the layer, PyTorch's default. optimizer: sgd or adam."""

    name: str
    start: str
    optimizer: str = "sgd"
    rate: float = 0.2


@dataclass(frozen=True)
class Plan:
    """rows: training images, the first of a permutation by the first seed. points: of each way of spacing them."""

    settings: tuple[Setting, ...]
    widths: tuple[int, ...]
    seed: int = 0
    seeds: int = 5
    rows: int = 60_000
    epochs: int = 4
    batch: int = 256
    points: int = 30

    @property
    def steps(self) -> int:
        """Of one training; the rows that do not fill a last batch are left out of their epoch."""
        return self.rows // self.batch * self.epochs


@dataclass(frozen=True)
class Data:
    """Rows to train on and to test on, and what they are, for the digest."""

    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]
    test: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]
    classes: int
    sha256: str


def data(images: Images, plan: Plan) -> Data:
    """The plan's rows. Raises UserError when there are too few, or less than one batch."""
    if not plan.batch <= plan.rows <= len(images.train):
        raise UserError(
            f"{images.name}: {len(images.train)} training images; {plan.rows} in batches of {plan.batch} are wanted."
        )
    kept = np.sort(np.random.default_rng(plan.seed).permutation(len(images.train))[: plan.rows])
    train = inputs(images.train[kept]), torch.from_numpy(images.train_labels[kept])
    test = inputs(images.test), torch.from_numpy(images.test_labels)
    return Data(train, test, int(images.train_labels.max()) + 1, images.sha256)


def inputs(images: UInt8[np.ndarray, "n a b"]) -> Float[Tensor, "n d"]:
    """Pixels from 0 to 1 in float32, and a 1."""
    x = torch.from_numpy(np.array(images)).flatten(1).float() / 255
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def initial(setting: Setting, width: int, d: int, classes: int, seed: int) -> list[Tensor]:
    """`[A, B, b]` at the start, float32; the same draws whatever is then set to zero."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(bound: float, *size: int) -> Tensor:
        return (2 * torch.rand(*size, generator=generator) - 1) * bound

    a, second = uniform((d - 1) ** -0.5, width, d), uniform(width**-0.5, classes, width + 1)
    b, bias = second[:, :-1].clone(), second[:, -1].clone()
    if setting.start in ("second", "zero"):
        a.zero_()
    if setting.start in ("first", "zero"):
        b.zero_(), bias.zero_()
    if setting.start == "biases":
        a[:, :-1] = 0
        b.zero_()
    return [a, b, bias]


def logits(theta: list[Tensor], x: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
    """`x (B A)ᵀ + b`."""
    a, b, bias = theta
    return x @ (b @ a).T + bias


def measured_steps(plan: Plan) -> list[int]:
    """The steps after which a training is looked at, ascending; never step 0, where nothing has changed."""
    every = range(math.ceil(math.log(plan.steps) / math.log(RATIO)))
    steps = {min(plan.steps, round(RATIO**k)) for k in every}
    return sorted(steps | {s for how in ("log", "even") for s in spaced(how, plan.steps, plan.points)})


def spaced(spacing: str, last: int, points: int) -> list[int]:
    """At most `points` different steps from the first to `last`, log-spaced or evenly spaced."""
    points = min(points, last)
    at = np.geomspace(1, last, points) if spacing == "log" else np.linspace(last / points, last, points)
    return sorted({round(float(s)) for s in at})


def train(data: Data, plan: Plan, setting: Setting, width: int, seed: int) -> dict[str, Any]:
    """One training: `steps` and a list of numbers for each of MEASURES; what the weights' gradients were.

    stopped: the step at which the loss or a measure was not finite; what was seen before it is kept. None: it ran to
    its end. largest_weight_gradient: of any entry of A's weights and of B, at any step.
    """
    theta = initial(setting, width, data.train[0].shape[1], data.classes, seed)
    start = [t.clone() for t in theta]
    before = torch.log_softmax(logits(theta, data.test[0]).double(), dim=1)
    wanted = set(measured_steps(plan))
    seen: dict[str, list[float]] = {k: [] for k in ("steps", *MEASURES)}
    largest, stopped = 0.0, None
    for step, gradients in enumerate(_steps(theta, data, plan, setting, seed), 1):
        if gradients is None:
            stopped = step
            break
        if setting.start == "zero":
            largest = max(largest, float(gradients[0].abs().max()), float(gradients[1].abs().max()))
        if step in wanted:
            now = look(theta, start, before, data.test)
            if not all(map(math.isfinite, now.values())):
                stopped = step
                break
            for name, value in {"steps": step, **now}.items():
                seen[name].append(value)
    return {
        **seen,
        "stopped": stopped,
        "size": sum(t.numel() for t in theta),
        "start_norm": float(sum(t.double().square().sum() for t in start)) ** 0.5,
        "largest_weight_gradient": largest if setting.start == "zero" else None,
        "rank": None if stopped else rank(theta),
        "answers": torch.unique(logits(theta, data.test[0]).argmax(1)).tolist() if stopped is None else [],
    }


def _steps(theta: list[Tensor], data: Data, plan: Plan, setting: Setting, seed: int) -> Iterator[list[Tensor] | None]:
    """Change `theta` in place, a step at a time; the gradients of each, or None where the loss is not finite."""
    x, y = data.train
    for t in theta:
        t.requires_grad_(True)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[setting.optimizer](theta, lr=setting.rate, fused=True)
    order = torch.Generator().manual_seed(seed + 1_000_003)  # not the initial point's
    for _ in range(plan.epochs):
        shuffled = torch.randperm(len(x), generator=order)
        for i in shuffled[: len(x) // plan.batch * plan.batch].split(plan.batch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits(theta, x[i]), y[i])
            if not math.isfinite(float(loss.detach())):
                yield None
                return
            loss.backward()
            optimizer.step()
            yield [t.grad for t in theta if t.grad is not None]


@torch.no_grad()
def look(
    theta: list[Tensor],
    start: list[Tensor],
    before: Float[Tensor, "m C"],
    test: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]],
) -> dict[str, float]:
    """MEASURES at one point. before: log-probabilities of the test images at the start, in float64."""
    z = logits(theta, test[0]).double()
    now = torch.log_softmax(z, dim=1)
    change = (now - before) - (now - before).mean(1, keepdim=True)
    return {
        "parameters": float(sum((t - s).double().square().sum() for t, s in zip(theta, start, strict=True))) ** 0.5,
        "accuracy": float((z.argmax(1) == test[1]).double().mean()),
        "logits": float(change.square().mean()) ** 0.5,
        "kl": float((now.exp() * (now - before)).sum(1).mean()),
        "loss": float(torch.nn.functional.nll_loss(now, test[1])),
    }


@torch.no_grad()
def rank(theta: list[Tensor]) -> int:
    """Of the images' map B A (without the bias): singular values above 1e-4 of the largest."""
    values = torch.linalg.svdvals((theta[1] @ theta[0])[:, :-1].double())
    return int((values > 1e-4 * values[0]).sum()) if float(values[0]) > 0 else 0


def kept(
    data: Data, plan: Plan, setting: Setting, width: int, seed: int, folder: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """`train`, or what `folder` has of the very same training; finished ones are kept there."""
    decides = {k: v for k, v in asdict(plan).items() if k not in ("settings", "widths", "seeds")}
    of = [setting.start, setting.optimizer, setting.rate]
    what = [data.sha256, decides, of, width, seed, torch.__version__]

    def make() -> dict[str, Any]:
        found = train(data, plan, setting, width, seed)
        end = f"stopped at step {found['stopped']}, not finite" if found["stopped"] else f"{found['accuracy'][-1]:.1%}"
        note(f"{setting.name}, width {width}, seed {seed}: {end}")
        return found

    return dict(pieces.kept(f"training-{VERSION}", what, make, folder))
