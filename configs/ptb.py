"""Penn Treebank, word level, vocabulary 10,000: DEQ-Transformers of 24.0M parameters, and what they are compared with.

    python -m deq_flax.main --config configs/ptb.py[:VARIANT] --workdir DIR

| variant | what | test perplexity |
|---|---|---|
| base | Anderson and Jacobian regularization; 40,000 steps, about 96 epochs | published: none; not trained here |
| ift | Broyden both ways, no regularization, no pretraining | not trained here |
| reversible | a reversible iteration instead of solver and adjoint | not trained here |
| deq_lm | three blocks in f, 12 evaluations unrolled, no solve | not trained here |
| explicit | no equilibrium: a Transformer-XL of 8 such blocks | not trained here |
| proposal | 7 explicit blocks propose, the equilibrium of an 8th refines; otherwise as `explicit` | not trained here |
| short | 600 steps of a model of 1.6M, on two CPU cores | measured: see docs/recipes.md |

For comparison: DEQ-TrellisNet with 24M parameters 57.1, a heavily regularized Transformer-XL with 24M 54.5.

Parameters of `base`, with d = 480, one softmax over all words and its matrix tied to the embedding:
    embedding and softmax  10,000 d + 10,000                  4.810M
    attention              3 d^2 (q, k, v) + d^2 (positions) + d^2 (output)   1.152M
    input injection        3 d^2 + 3 d                        0.693M
    feed-forward           2 d 18,000 + 18,000 + d           17.298M
    biases, norm gains     attention 3 d, weight norm 18,000 + 6 d   0.022M
    in all                                                   23.975M
Cost: 40,000 steps of 32 x 70 tokens. The corpus is tiny for that many parameters, hence the dropout, the Jacobian
regularization and the running average.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "language",
    "data": {
        "name": "ptb",
        "path": "data/ptb",
        "batch_size": 32,
        "seq_len": 70,
        "eval_batch_size": 10,
        "eval_seq_len": 70,
    },
    "model": {
        "name": "deq_transformer",
        "d_model": 480,
        "d_embed": 480,
        "n_head": 8,
        "d_head": 60,
        "d_inner": 18_000,
        "mem_len": 70,
        "dropout": 0.4,
        "attention_dropout": 0.1,
        "output_dropout": "features",
    },
    "deq": {
        "solver": "anderson",
        "max_steps": 16,
        "backward_max_steps": 16,
        "jacobian_weight": 0.5,
        "jacobian_frequency": 0.3,
        "max_steps_jitter": 2,
        "pretrain_steps": 8_000,
    },
    "optimizer": {"learning_rate": 2.5e-4, "warmup_steps": 2_000, "clip_norm": 0.25, "weight_decay": 1.2e-6},
    "train": {"steps": 40_000, "ema_decay": 0.999},
}

VARIANTS = {
    "base": {},
    "ift": {
        "deq.solver": "broyden",
        "deq.max_steps": 30,
        "deq.backward_max_steps": 30,
        "deq.jacobian_weight": 0.0,
        "deq.max_steps_jitter": 0,
        "deq.pretrain_steps": 0,
    },
    "reversible": {
        "deq.gradient": "reversible",
        "deq.jacobian_weight": 0.0,
        "deq.max_steps_jitter": 0,
        "deq.pretrain_steps": 0,
    },
    "deq_lm": {
        "model.d_inner": 5_195,
        "model.blocks": 3,
        "model.pre_norm": True,
        "model.affine_norm": True,
        "deq.solver": "picard",
        "deq.max_steps": 12,
        "deq.gradient": "unroll",
        "deq.jacobian_weight": 0.0,
        "deq.max_steps_jitter": 0,
        "deq.pretrain_steps": 0,
    },
    "explicit": {
        "model.name": "transformer_xl",
        "deq": None,
        "model.d_inner": 1_285,
        "model.blocks": 8,
        "model.pre_norm": True,
        "model.affine_norm": True,
    },
    "proposal": {
        "model.name": "proposal_deq",
        "model.d_inner": 1_285,
        "model.proposal_blocks": 7,
        "model.pre_norm": True,
        "model.affine_norm": True,
        "deq.jacobian_weight": 0.0,
        "deq.max_steps_jitter": 0,
        "deq.pretrain_steps": 0,
    },
    "short": {
        "data.batch_size": 16,
        "data.seq_len": 48,
        "data.eval_seq_len": 48,
        "model.d_model": 128,
        "model.d_embed": 128,
        "model.n_head": 4,
        "model.d_head": 32,
        "model.d_inner": 768,
        "model.mem_len": 48,
        "model.dropout": 0.1,
        "model.attention_dropout": 0.0,
        "deq.pretrain_steps": 200,
        "optimizer.learning_rate": 2e-3,
        "optimizer.warmup_steps": 50,
        "train.steps": 600,
        "train.log_every": 20,
        "train.eval_every": 200,
        "train.checkpoint_every": 200,
        "train.ema_decay": 0.0,
    },
}


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
