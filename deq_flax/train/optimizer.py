"""The optimizer and its learning-rate schedule, by name (section `optimizer` of a config).

`weight_decay` has the meaning that each method's authors gave it: for `adam`, `sgd` and `radam` it is L2 regularization,
added to the (clipped) gradient as PyTorch does; for `adamw` and `lamb` it is decoupled from the gradient's scaling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from deq_flax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Section `optimizer` of a config."""

    name: Literal["adam", "adamw", "sgd", "radam", "lamb"] = "adam"
    """Optimizer: adam, adamw, sgd, radam or lamb."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Decay of the learning rate over train.steps: constant, cosine or linear."""
    clip_norm: float = 0.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    weight_decay: float = 0.0
    """Weight decay: added to the gradient by adam, sgd and radam, decoupled from it by adamw and lamb."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients, of all but sgd."""
    momentum: float = 0.0
    """Momentum of sgd."""
    nesterov: bool = False
    """Use Nesterov momentum in sgd."""

    def __post_init__(self):
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps must be at least 0, not {self.warmup_steps}")
        if not (self.clip_norm >= 0 and self.weight_decay >= 0):
            raise UserError(
                f"optimizer.clip_norm and weight_decay must not be negative, not {self.clip_norm} and {self.weight_decay}"
            )
        if not 0 <= self.beta2 < 1:
            raise UserError(f"optimizer.beta2 must be at least 0 and below 1, not {self.beta2}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum must be at least 0 and below 1, not {self.momentum}")
        if (self.momentum or self.nesterov) and self.name != "sgd":
            raise UserError(f"optimizer.momentum and nesterov belong to sgd; set them to 0 and False for {self.name}")
        if self.nesterov and not self.momentum:
            raise UserError("optimizer.nesterov needs a momentum above 0")


_DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """The learning rate of update `step`, counted from 0.

    Linear warm-up `learning_rate * step / warmup_steps` before `warmup_steps`; from there on the decay, measured from step 0
    (not from the end of the warm-up), as the published recipes have it: cosine gives
    `learning_rate * (1 + cos(pi * step / steps)) / 2`. After `steps` it keeps its last value.
    """
    decay = _DECAYS[options.schedule]

    def learning_rate_at(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, float)
        warm = step / max(options.warmup_steps, 1)
        decayed = decay(jnp.minimum(step / steps, 1.0))
        return options.learning_rate * jnp.where(step < options.warmup_steps, warm, decayed)

    return learning_rate_at


def make_optimizer(options: OptimizerOptions, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation for a run of `steps` updates, and its schedule (for the log).

    The gradient is clipped first. The count of updates, which drives the schedule, is part of the optimizer state.
    """
    schedule, rate = make_schedule(options, steps), optax.scale_by_learning_rate
    l2, momentum = optax.add_decayed_weights(options.weight_decay), options.momentum
    update: tuple[optax.GradientTransformation, ...]
    match options.name:
        case "adam":
            update = l2, optax.scale_by_adam(b2=options.beta2), rate(schedule)
        case "radam":
            update = l2, optax.scale_by_radam(b2=options.beta2), rate(schedule)
        case "sgd":
            trace = optax.trace(decay=momentum, nesterov=options.nesterov) if momentum else optax.identity()
            update = l2, trace, rate(schedule)
        case "adamw":
            update = (optax.adamw(schedule, b2=options.beta2, weight_decay=options.weight_decay),)
        case "lamb":
            update = (optax.lamb(schedule, b2=options.beta2, weight_decay=options.weight_decay),)
    clip = (optax.clip_by_global_norm(options.clip_norm),) if options.clip_norm else ()
    return optax.chain(*clip, *update), schedule
