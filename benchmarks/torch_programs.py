"""The parts of a training step in PyTorch as programs, the same as those of `training.Training.programs`.

A network has `equation(*inputs)` -> (f, z0), `solve(*inputs)` -> z, `loss(z, targets)` and `forward(*inputs, targets)` -> loss.
Its state z is a tensor, or a tuple of tensors that f takes as separate arguments.
"""

import torch


def programs(network, inputs, targets, steps):
    """The programs to time, by case."""
    optimizer = torch.optim.Adam(network.parameters(), 2.5e-4)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.25)
        optimizer.step()

    def vjp():
        f, z0 = network.equation(*inputs)
        z = tuple(part.detach().requires_grad_() for part in parts(z0))
        y = parts(f(*z))
        v = tuple(torch.ones_like(part) for part in y)
        for _ in range(steps):
            v = torch.autograd.grad(y, z, v, retain_graph=True)

    def step_of_one():
        f, z0 = network.equation(*inputs)
        update(network.loss(f(*parts(z0)), targets))

    return {
        "f": repeated(network, inputs, steps),
        "vjp": vjp,
        "step of one evaluation": step_of_one,
        "step": lambda: update(network(*inputs, targets)),
    }


def repeated(network, inputs, steps):
    """A program with `steps` evaluations of f, without a gradient."""

    @torch.no_grad()
    def run():
        f, z = network.equation(*inputs)
        for _ in range(steps):
            z = f(*parts(z))

    return run


def parts(z):
    """The tensors of a state, a tuple."""
    return z if isinstance(z, tuple | list) else (z,)
