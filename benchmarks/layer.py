"""The layer that solvers are timed on: one Transformer block with injected attention input, in JAX and in PyTorch.

B 4, length 64, 256 features, 8 heads, 1024 inner features, float32, no memory, inputs N(0, 0.02): larger ones make softmax
values denormal and slow every library down.
"""

import numpy as np

BATCH, LENGTH, WIDTH, HEADS, INNER = 4, 64, 256, 8, 1024


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The same numbers for every library."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (random.normal(size=shape) * scale).astype(np.float32)

    return {
        "qkv": normal(WIDTH, 3 * WIDTH, scale=WIDTH**-0.5),
        "out": normal(WIDTH, WIDTH, scale=WIDTH**-0.5),
        "inner": normal(WIDTH, INNER, scale=WIDTH**-0.5),
        "outer": normal(INNER, WIDTH, scale=0.5 * INNER**-0.5),
        "x": normal(BATCH, LENGTH, 3 * WIDTH, scale=0.02),
    }


def jax_layer(w: dict, z):
    """f(z), (B, L, D) -> (B, L, D), as a plain JAX program."""
    import jax
    import jax.numpy as jnp

    def norm(y):
        y = y - y.mean(-1, keepdims=True)
        return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)

    heads = (z @ w["qkv"] + w["x"]).reshape(BATCH, LENGTH, 3, HEADS, WIDTH // HEADS)
    q, k, v = (heads[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = jnp.einsum("bhie,bhje->bhij", q, k) * (WIDTH // HEADS) ** -0.5
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    attended = jnp.einsum("bhij,bhje->bihe", jax.nn.softmax(jnp.where(causal, scores, -1e30)), v)
    h = norm(z + attended.reshape(BATCH, LENGTH, WIDTH) @ w["out"])
    return norm(h + jax.nn.relu(h @ w["inner"]) @ w["outer"])


def torch_layer(w: dict, z):
    """The same in PyTorch."""
    import torch
    import torch.nn.functional as functional

    heads = (z @ w["qkv"] + w["x"]).view(BATCH, LENGTH, 3, HEADS, WIDTH // HEADS)
    q, k, v = (heads[:, :, i].transpose(1, 2) for i in range(3))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    attended = attended.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)
    h = functional.layer_norm(z + attended @ w["out"], (WIDTH,))
    return functional.layer_norm(h + torch.relu(h @ w["inner"]) @ w["outer"], (WIDTH,))
