"""Numbers computed with the authors' original PyTorch code, and its parameter names mapped to ours.

Floating arrays are float64 (gradients are stored rounded to float32). The originals are laid out (features, length) or
(length, batch): the helpers here turn them into (batch, length, features).
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.equilibrium import fixed_point, jacobian_loss
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.language_model import TransformerOptions

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
"""The `compiler_options` of `jax.jit` for tiny models, whose tests spend nearly all their time compiling."""

FOLDER = Path(__file__).parent / "data" / "reference"

MODULES = {
    "inject_conv": "injection",
    "func.dec_attn.qkv_net": "cell/qkv",
    "func.dec_attn.r_net": "cell/relative",
    "func.dec_attn.o_net": "cell/out",
    "func.pos_ff.ff1_net": "cell/inner",
    "func.pos_ff.ff2_net": "cell/outer",
}
LINEAR = {"weight": "weight_IO", "weight_v": "v_IO", "weight_g": "g_O", "bias": "bias_O"}
SINGLE = {
    "func.dec_attn.r_w_bias": "cell/content_bias_HE",
    "func.dec_attn.r_r_bias": "cell/position_bias_HE",
    "crit.cluster_weight": "softmax/clusters_EC",
    "crit.cluster_bias": "softmax/cluster_biases_C",
}


def load(name):
    """The arrays of a fixture by name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def facts():
    """{'hparams': hyperparameters by fixture, 'wt103': shapes and parameter count of the full-size model}."""
    return json.loads((FOLDER / "language_models.json").read_text())


def our_name(theirs, n_projections):
    """Path of our Param for the original parameter `theirs`; tied weights share one."""
    if theirs in SINGLE:
        return SINGLE[theirs]
    if match := re.fullmatch(r"(?:word_emb\.emb|crit\.out)_layers\.(\d+)\.weight", theirs):
        return f"embedding/tables_NE/{match[1]}"
    if match := re.fullmatch(r"crit\.out_layers\.(\d+)\.bias", theirs):
        return f"softmax/biases_N/{match[1]}"
    if theirs == "crit.out_projs.0.weight":
        return "softmax/projections_ED/0"
    if match := re.fullmatch(r"(?:word_emb\.emb|crit\.out)_projs\.(\d+)\.weight", theirs):
        return f"embedding/projections_ED/{min(int(match[1]), n_projections - 1)}"
    module, leaf = theirs.rsplit(".", 1)
    return f"{MODULES[module]}/{LINEAR[leaf]}"


def our_layout(theirs, array):
    """An original array in the layout of our Param."""
    if theirs.endswith(("r_w_bias", "r_r_bias")) or "_layers." in theirs:
        return array
    if theirs.endswith(("bias", "weight_g")):
        return array.reshape(-1)
    return array.reshape(array.shape[:2]).T


def our_gradients(arrays, prefix):
    """{path: gradient} from the entries under `prefix`: shared storage gets the sum of its entries."""
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    n_projections = sum("emb_projs" in name for name in names)
    gradients = {}
    for name in names:
        path = our_name(name, n_projections)
        gradients[path] = gradients.get(path, 0) + our_layout(name, arrays[prefix + name]).astype(np.float64)
    return gradients


def build(name, *, weights=None, wide=True, **options):
    """The model of a fixture with its weights, as float64 if `wide`, without dropout unless `options` change that."""
    h = facts()["hparams"][name]
    same = {key: h[key] for key in ("d_model", "d_embed", "n_head", "d_head", "d_inner", "mem_len", "local_size")}
    sizes = same | dict(vocab_size=h["n_token"], cutoffs=h["cutoffs"], div_value=h["div_val"])
    kind = dict(pre_norm=h["pre_lnorm"], weight_norm=h["wnorm"], dropout=0.0)
    model = nnx.eval_shape(lambda: DEQTransformer(TransformerOptions(**(sizes | kind | options)), rngs=nnx.Rngs(0)))
    params = parameters(model)
    stored = load(f"{weights or name}_weights")
    n_projections = sum("emb_projs" in key for key in stored)
    left = set(params)
    for theirs, array in stored.items():
        if theirs != "pos_emb.inv_freq":
            path = our_name(theirs, n_projections)
            value = our_layout(theirs, array)
            assert params[path].shape == value.shape, path
            params[path].set_value(jnp.asarray(value, jnp.float64 if wide else jnp.float32))
            left.remove(path)
    assert not left, left
    return model


def solving(*, jacobian_key=None, jacobian_through_equilibrium=False, **options):
    """An argument `solve` of a model: `fixed_point` with `options` and, given a key, the Jacobian loss at its solution."""

    def solve(f, z0, *inputs):
        solution = fixed_point(f, z0, *inputs, **options)
        if jacobian_key is None:
            return solution, None
        z = solution.value if jacobian_through_equilibrium else jax.lax.stop_gradient(solution.value)
        return solution, jacobian_loss(lambda z: f(z, *inputs), z, jacobian_key)

    return solve


def parameters(model):
    """{path: Param} of a module."""
    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def flat(state):
    """{path: array} of a state, whose leaves are Variables or arrays."""
    return {
        "/".join(map(str, path)): np.asarray(x.get_value() if isinstance(x, nnx.Variable) else x)
        for path, x in nnx.to_flat_state(state)
    }


def by_batch(array):
    """(length, batch, ...) -> (batch, length, ...)."""
    return jnp.asarray(np.swapaxes(array, 0, 1))


def by_features_last(array):
    """(batch, features, length) -> (batch, length, features)."""
    return jnp.asarray(np.swapaxes(array, 1, 2))
