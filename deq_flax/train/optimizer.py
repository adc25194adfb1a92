"""The optimizer and its learning-rate schedule, by name.

`weight_decay` means what each method's authors meant: for `adam`, `sgd` and `radam` it is L2 regularisation, added to the
(clipped) gradient as PyTorch does; for `adamw` and `lamb` it is decoupled from the gradient's scaling.
"""

import math

import jax.numpy as jnp
import optax

from deq_flax.errors import UserError


def _adam(weight_decay, momentum, nesterov):
    return optax.add_decayed_weights(weight_decay), optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def _adamw(weight_decay, momentum, nesterov):
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), optax.add_decayed_weights(weight_decay)


def _sgd(weight_decay, momentum, nesterov):
    step = optax.trace(decay=momentum, nesterov=nesterov) if momentum else optax.identity()
    return optax.add_decayed_weights(weight_decay), step


def _radam(weight_decay, momentum, nesterov):
    return optax.add_decayed_weights(weight_decay), optax.scale_by_radam(b1=0.9, b2=0.999, eps=1e-8)


def _lamb(weight_decay, momentum, nesterov):
    scale = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6)
    return scale, optax.add_decayed_weights(weight_decay), optax.scale_by_trust_ratio()


_OPTIMIZERS = {"adam": _adam, "adamw": _adamw, "sgd": _sgd, "radam": _radam, "lamb": _lamb}

_DECAYS = {
    "constant": lambda progress: jnp.ones_like(progress),
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def make_schedule(*, schedule: str, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """The learning rate of update `step`, counted from 0.

    Linear warm-up `learning_rate * step / warmup_steps` before `warmup_steps`; from there on the decay, measured from step 0
    (not from the end of the warm-up), as the published recipes have it: cosine gives
    `learning_rate * (1 + cos(pi * step / steps)) / 2`. After `steps` it stays where it ended.

    Raises:
      UserError: an unknown schedule or a number out of range.
    """
    if schedule not in _DECAYS:
        raise UserError(f"unknown optimizer.schedule {schedule!r}; known: {', '.join(_DECAYS)}")
    if steps < 1 or warmup_steps < 0:
        raise UserError(f"train.steps must be at least 1 and optimizer.warmup_steps at least 0, not {steps} and {warmup_steps}")
    decay = _DECAYS[schedule]

    def learning_rate_at(step):
        step = jnp.asarray(step, float)
        warm = step / max(warmup_steps, 1)
        return learning_rate * jnp.where(step < warmup_steps, warm, decay(jnp.minimum(step / steps, 1.0)))

    return learning_rate_at


def make_optimizer(
    *,
    name: str,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    steps: int,
    clip_norm: float,
    weight_decay: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and its schedule (for the report).

    The gradient is clipped to global norm `clip_norm` first (0 turns that off). `momentum` and `nesterov` are sgd's. The count
    of updates, which drives the schedule, lives in the optimizer state.

    Raises:
      UserError: an unknown name, or a number that makes no sense.
    """
    if name not in _OPTIMIZERS:
        raise UserError(f"unknown optimizer.name {name!r}; known: {', '.join(_OPTIMIZERS)}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"optimizer.learning_rate must be positive, not {learning_rate}")
    if not (clip_norm >= 0 and weight_decay >= 0):
        raise UserError(f"optimizer.clip_norm and weight_decay must not be negative, not {clip_norm} and {weight_decay}")
    if not 0 <= momentum < 1:
        raise UserError(f"optimizer.momentum must be at least 0 and below 1, not {momentum}")
    if (momentum or nesterov) and name != "sgd":
        raise UserError(f"optimizer.momentum and nesterov belong to sgd; set them to 0 and False for {name}")
    if nesterov and not momentum:
        raise UserError("optimizer.nesterov needs a momentum above 0")
    learning_rate_at = make_schedule(schedule=schedule, learning_rate=learning_rate, warmup_steps=warmup_steps, steps=steps)
    clip = (optax.clip_by_global_norm(clip_norm),) if clip_norm else ()
    update = _OPTIMIZERS[name](weight_decay, momentum, nesterov)
    return optax.chain(*clip, *update, optax.scale_by_learning_rate(learning_rate_at)), learning_rate_at
