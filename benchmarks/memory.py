"""Memory of a training step, by the compiler's own analysis: against the limit on evaluations, and by choice.

    python -m benchmarks.memory [--write] [--only layer steps wt103]

No step is run. Live bytes at the peak are the arguments (parameters, optimizer, batch, carry), the temporaries, and the results
that do not take an argument's place. They are those of the backend that compiles: an accelerator's differ a little.

`wt103` compiles the full model, 98M parameters and 267,735 words, at 14 sequences of 150 tokens: a fourth of the batch.
"""

import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tables, training
from benchmarks.layer import jax_layer, weights
from deq_flax import SHINE, Anderson, Broyden, Implicit, PhantomGradient, Picard, Reversible, Unroll, fixed_point

LIMITS = (10, 20, 40, 60)
GRADIENTS = {
    "Implicit, Anderson": lambda limit: (Anderson(max_steps=limit), Implicit()),
    "Implicit, Broyden(memory=10)": lambda limit: (Broyden(max_steps=limit, memory=10), Implicit()),
    "Implicit, Broyden()": lambda limit: (Broyden(max_steps=limit), Implicit()),
    "SHINE, Broyden(memory=10)": lambda limit: (Broyden(max_steps=limit, memory=10), SHINE()),
    "PhantomGradient": lambda limit: (Anderson(max_steps=limit), PhantomGradient()),
    "Reversible": lambda limit: (Picard(max_steps=limit), Reversible()),
    "Unroll": lambda limit: (Picard(max_steps=limit), Unroll(limit)),
}
KEPT_10 = {"deq.solver_options": {"memory": 10}, "deq.backward_solver_options": {"memory": 10}}
STEPS = {
    "transformer, Anderson / Broyden": ("wt103", {}),
    "transformer, Anderson / Broyden, 10 pairs kept": ("wt103", KEPT_10),
    "transformer, Broyden / Broyden": ("wt103", {"deq.solver": "broyden"}),
    "transformer, Broyden / Broyden, 10 pairs kept": ("wt103", {"deq.solver": "broyden"} | KEPT_10),
    "transformer, reversible": ("wt103", {"deq.gradient": "reversible"}),
    "mdeq tiny, Broyden / Broyden": ("cifar10:tiny", {}),
    "mdeq large, Broyden / Broyden": ("cifar10:large", {}),
    "mdeq large, Broyden / Broyden, 10 pairs kept": ("cifar10:large", KEPT_10),
}
"""Row -> config and changes to it; sizes as in train_step.py."""
WT103 = {
    "base: Anderson 30, Broyden 35": ("base", {}),
    "base in bfloat16": ("base", {"model.dtype": "bfloat16"}),
    "base, 10 pairs of Broyden's kept": ("base", KEPT_10),
    "base, phantom gradient, 5 steps": ("base", {"deq.gradient": "phantom"}),
    "base, reversible": ("base", {"deq.gradient": "reversible"}),
    "reg: memory 300, Jacobian loss": ("reg", {}),
    "ift: Broyden 35 both ways": ("ift", {}),
    "deq_lm: 12 evaluations unrolled, rematerialized": ("deq_lm", {}),
    "explicit: 12 layers": ("explicit", {}),
}


def peak(compiled: Any) -> tuple[float, float]:
    """Megabytes live at the peak, and those of them that are temporary."""
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (kept + temporary) / 1e6, temporary / 1e6


def of_the_layer(choice: Callable, limit: int) -> float:
    """Temporary megabytes of the gradient of one layer."""
    w = {name: jnp.asarray(value) for name, value in weights().items()}
    z0 = jnp.zeros((*w["x"].shape[:2], w["out"].shape[0]))
    solver, gradient = choice(limit)

    def loss(w):
        return jnp.sum(jnp.sin(fixed_point(lambda z: jax_layer(w, z), z0, solver=solver, gradient=gradient).value))

    return peak(jax.jit(jax.grad(loss)).lower(w).compile())[1]


def of_a_step(name: str, changes: dict[str, Any], limit: int) -> float:
    """Temporary megabytes of a step with `limit` evaluations each way."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "wt103":
            sizes = training.timing_text(folder, limit)
        else:
            sizes = {"data.batch_size": 8, "data.eval_batch_size": 8} | training.images(folder, 32) | training.exactly(limit)
        file, _, variant = name.partition(":")
        run = training.Training(training.resolved(f"configs/{file}.py:{variant}".rstrip(":"), sizes | changes))
        return peak(run.traced().lower().compile())[1]


def of_wt103() -> Iterator[list[str]]:
    """Rows of the full model at 14 sequences a device."""
    for label, (variant, changes) in WT103.items():
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"data.batch_size": 14, "deq.pretrain_steps": 0} | training.text(folder, 267_735, 14 * 151)
            config = training.resolved(f"configs/wt103.py:{variant}", sizes | changes)
            run = training.Training(config)
            jacobian_loss = config.deq is not None and config.deq.jacobian_weight > 0
            whole, temporary = peak(run.traced(jacobian_loss=jacobian_loss).lower().compile())
        print(f"{label}: {whole / 1e3:.2f} GB", flush=True)
        yield [label, f"{(whole - temporary) / 1e3:.2f}", f"{temporary / 1e3:.2f}", f"{whole / 1e3:.2f}"]


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("layer", "steps", "wt103"), default=("layer", "steps", "wt103"))
    arguments = parser.parse_args()
    on = f"{jax.devices()[0].device_kind}, jax {version('jax')}, float32 unless said."
    limits = [f"{limit}" for limit in LIMITS]
    if "layer" in arguments.only:
        rows = [[name, *(f"{of_the_layer(choice, limit):.1f}" for limit in LIMITS)] for name, choice in GRADIENTS.items()]
        text = f"{on} Temporary megabytes of the gradient of the layer, by the limit on evaluations:\n\n"
        tables.publish("memory of the layer", text + tables.markdown(["gradient", *limits], rows), arguments.write)
    if "steps" in arguments.only:
        rows = [[name, *(f"{of_a_step(*choice, limit):.0f}" for limit in LIMITS)] for name, choice in STEPS.items()]
        text = f"{on} Temporary megabytes of a training step, batch 8, by the limit on evaluations each way:\n\n"
        tables.publish(
            "memory of a step", text + tables.markdown(["model, forward / adjoint solver", *limits], rows), arguments.write
        )
    if "wt103" in arguments.only:
        head = ["wt103, 14 x 150 tokens", "parameters, optimizer, carry", "temporary", "peak, GB"]
        text = f"{on}\n\n" + tables.markdown(head, list(of_wt103()))
        tables.publish("memory of wt103", text, arguments.write)


if __name__ == "__main__":
    main()
