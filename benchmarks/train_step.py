"""A training step of the DEQ-Transformer, beside the same in PyTorch and beside the evaluations of f that it cannot do without.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.train_step [--rounds 9] [--write benchmarks/train_step.md]

10,000 words, cutoffs 2000 and 5000, 256 features, 8 heads, 1024 inner features, sequence and memory 64, batch 8, float32, 12
evaluations each way at tolerance 0 (Anderson forward, Broyden adjoint), Adam, clipping. The limit is 12 times f and 12 times
its vector-Jacobian product, each alone in a loop, and the rest: embedding, context, one vector-Jacobian product with the
parameters, softmax, optimizer, which is timed as a step with one unrolled evaluation, less that evaluation.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import turns

LIBRARIES = {"deq_flax": "jax", "torchdeq": "torchdeq"}
CASES = ("f", "vjp", "step of one evaluation", "step")
VOCAB, WIDTH, HEADS, INNER, CUTOFFS, DIV = 10_000, 256, 8, 1024, (2_000, 5_000), 4
BATCH, LENGTH, STEPS = 8, 64, 12


def tokens(count: int) -> np.ndarray:
    """Words as rare as in a text: the r-th with a probability of about 1 / r."""
    weights = 1 / np.arange(1, VOCAB + 1)
    return np.random.default_rng(0).choice(VOCAB, count, p=weights / weights.sum()).astype(np.int32)


def ours() -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from deq_flax.task import Controls, Phase
    from deq_flax.tasks.language import LanguageTask
    from deq_flax.train.loop import TrainOptions, _Run
    from deq_flax.train.mesh import make_mesh

    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid", "test"):
            np.save(Path(folder) / f"{split}.npy", tokens(BATCH * LENGTH * 20 + 1))
        task = LanguageTask(**settings(folder), seed=0)
        batch = next(task.train_batches(1))
    options = TrainOptions(
        steps=1000, seed=0, log_every=1, eval_every=0, checkpoint_every=1000, accumulate=1, ema_decay=0.0, max_skipped=10
    )
    optimizer = dict(name="adam", learning_rate=2.5e-4, warmup_steps=0, schedule="cosine", clip_norm=0.25)
    run = _Run(
        task,
        options,
        make_mesh(data=1, fsdp=1, tensor=1),
        optimizer | dict(weight_decay=0.0, momentum=0.0, nesterov=False),
    )
    controls = Controls(max_steps=np.int32(STEPS), jacobian_weight=np.float32(0))

    def stepping(phase: Phase) -> Callable:
        def step():
            run.state, metrics = run._train_step(run.state, batch, controls, np.int32(1), phase=phase)
            jax.block_until_ready(metrics)

        return step

    model = task.build_model(nnx.Rngs(0))
    memory = model.fresh_memory(BATCH)._replace(length_B=jnp.full((BATCH,), LENGTH))

    @jax.jit
    def f(tokens_BL, memory):
        f, z0_BLD, _ = model.equation(tokens_BL, memory)
        return jax.lax.fori_loop(0, STEPS, lambda _, z_BLD: f(z_BLD), z0_BLD)

    @jax.jit
    def vjp(tokens_BL, memory):
        f, z0_BLD, _ = model.equation(tokens_BL, memory)
        _, pullback = jax.vjp(f, z0_BLD)
        return jax.lax.fori_loop(0, STEPS, lambda _, v_BLD: pullback(v_BLD)[0], jnp.ones_like(z0_BLD))

    return {
        "f": lambda: jax.block_until_ready(f(batch["inputs"], memory)),
        "vjp": lambda: jax.block_until_ready(vjp(batch["inputs"], memory)),
        "step of one evaluation": stepping(Phase(unrolled=True)),
        "step": stepping(Phase()),
    }


def settings(folder: str) -> dict[str, dict]:
    """The config's sections."""
    lengths = dict(seq_len=LENGTH, eval_seq_len=LENGTH, batch_size=BATCH, eval_batch_size=BATCH)
    limits = dict(tol=0.0, max_steps=STEPS, backward_tol=0.0, backward_max_steps=STEPS, max_steps_jitter=0)
    jacobian = dict(jacobian_weight=0.0, jacobian_frequency=0.0, jacobian_increment=0.0, jacobian_increment_every=0)
    return {
        "data": dict(name="tokens", path=folder, cache="") | lengths,
        "model": dict(vocab_size=VOCAB, d_model=WIDTH, d_embed=WIDTH, n_head=HEADS, d_head=WIDTH // HEADS, d_inner=INNER)
        | dict(cutoffs=CUTOFFS, div_value=DIV, mem_len=LENGTH, weight_norm=True, dropout=0.0, attention_dropout=0.0)
        | dict(dtype="float32"),
        "deq": dict(solver="anderson", backward_solver="broyden", stop="relative", pretrain_steps=0, pretrain_layers=1)
        | dict(jacobian_stop=0, jacobian_through_equilibrium=False)
        | limits
        | jacobian,
    }


def torch_peer() -> dict[str, Callable]:
    import torch

    from benchmarks.torch_transformer import Model

    torch.set_num_threads(turns.THREADS)
    torch.manual_seed(0)
    sizes = dict(vocab=VOCAB, width=WIDTH, heads=HEADS, inner=INNER, cutoffs=list(CUTOFFS), div=DIV)
    model = Model(**sizes, steps=STEPS)
    stream = torch.tensor(tokens(BATCH * LENGTH + 1)).long()
    inputs, targets = stream[:-1].view(BATCH, LENGTH), stream[1:].view(BATCH, LENGTH)
    memory = torch.zeros(BATCH, LENGTH, WIDTH), torch.zeros(BATCH, LENGTH, 3 * WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), 2.5e-4)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    def step():
        nonlocal memory
        loss, memory = model(inputs, targets, memory)
        update(loss)

    def step_of_one():
        f, _ = model.equation(inputs, memory)
        z = f(torch.zeros(BATCH, LENGTH, WIDTH))
        update(model.softmax(z.view(-1, WIDTH), targets.reshape(-1)).loss)

    def repeated():
        with torch.no_grad():
            f, _ = model.equation(inputs, memory)
            z = torch.zeros(BATCH, LENGTH, WIDTH)
            for _ in range(STEPS):
                z = f(z)

    def repeated_vjp():
        f, _ = model.equation(inputs, memory)
        z = torch.zeros(BATCH, LENGTH, WIDTH, requires_grad=True)
        y, v = f(z), torch.ones(BATCH, LENGTH, WIDTH)
        for _ in range(STEPS):
            (v,) = torch.autograd.grad(y, z, v, retain_graph=True)

    return {"f": repeated, "vjp": repeated_vjp, "step of one evaluation": step_of_one, "step": step}


def table(times: turns.Times) -> str:
    names = [name for name in LIBRARIES if (name, "step") in times]
    lines = [turns.machine(["jax", *[LIBRARIES[n] for n in names if n != "deq_flax"]]), ""]
    lines += ["Milliseconds (medians).", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    labels = {"f": f"{STEPS} x f", "vjp": f"{STEPS} x vjp"}
    for case in CASES:
        lines.append(f"| {labels.get(case, case)} | " + " | ".join(f"{1e3 * times[n, case]:.1f}" for n in names) + " |")
    limits = {}
    for n in names:
        one_of_each = (times[n, "f"] + times[n, "vjp"]) / STEPS
        limits[n] = times[n, "f"] + times[n, "vjp"] + times[n, "step of one evaluation"] - one_of_each
    lines.append("| the limit | " + " | ".join(f"{1e3 * limits[n]:.1f}" for n in names) + " |")
    lines.append("| step / limit | " + " | ".join(f"{times[n, 'step'] / limits[n]:.2f}" for n in names) + " |")
    if "torchdeq" in names:
        ratio = times["deq_flax", "step"] / times["torchdeq", "step"]
        lines += ["", f"Our step takes {ratio:.2f} of the peer's."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", help="also write the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return turns.work(torch_peer() if arguments.worker == "torchdeq" else ours())
    times, _ = turns.measure(__file__, LIBRARIES, CASES, arguments.rounds)
    text = table(times)
    print(text)
    if arguments.write:
        Path(arguments.write).write_text(text)


if __name__ == "__main__":
    main()
