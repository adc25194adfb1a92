"""WikiText-103, word level: the DEQ-Transformer of about 98M parameters, and a small one to try things with.

    python -m deq_flax.main --config configs/wt103.py[:VARIANT] --workdir DIR

| variant | what | test perplexity, published (memory) | measured |
|---|---|---|---|
| base | Anderson forward, Broyden backward, unrolled pretraining | 23.8; released weights 23.1 (300) | see docs/recipes.md |
| reg | Jacobian regularization, 12 evaluations | 24.9; 23.8 at sequence length 300 | see docs/recipes.md |
| preln_reg | the same with LayerNorm before the sublayers | 24.5 | see docs/recipes.md |
| ift | Broyden both ways, no pretraining | 23.78 (150), 23.31 (480) | see docs/recipes.md |
| ift_jr | ift with Jacobian regularization | 23.67 (150), 23.16 (480) | see docs/recipes.md |
| deq_lm | three blocks in f, 12 evaluations unrolled, no solve | 22.34 (150), 21.85 (480) | not trained here |
| explicit | no equilibrium: a Transformer-XL of 12 such blocks and as many parameters | none | not trained here |
| proposal | 11 explicit blocks propose, the equilibrium of a 12th refines; otherwise as `explicit` | none | not trained here |
| tiny | 4 heads of 24 on English that comes with Python, no download | none | see docs/recipes.md |
| tiny_explicit, tiny_proposal | two blocks of as many parameters; the second to its equilibrium | none | see docs/language.md |

Cost: 300,000 steps of 56 x 150 tokens; the originals took 2.8 to 3.1 times a Transformer-XL's training time (1.5 with
Jacobian regularization) and 3.7 to 3.9 GB at batch 15. `tiny` is meant for a few minutes on two CPU cores.
The numbers are those of Bai et al. 2019 and 2021 (base, reg, preln_reg) and of TorchDEQ's recipes (ift, ift_jr, deq_lm).
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "language",
    "data": {"name": "wt103", "path": "data/wikitext-103", "batch_size": 56, "seq_len": 150, "eval_seq_len": 150},
    "model": {
        "name": "deq_transformer",
        "d_model": 700,
        "d_embed": 700,
        "n_head": 10,
        "d_head": 70,
        "d_inner": 48_000,
        "cutoffs": (20_000, 40_000, 200_000),
        "div_value": 4,
        "mem_len": 150,
        "dropout": 0.05,
    },
    "deq": {"solver": "anderson", "backward_max_steps": 35, "pretrain_steps": 32_000},
    "optimizer": {"learning_rate": 2.5e-4, "warmup_steps": 16_000, "clip_norm": 0.25},
    "train": {"steps": 300_000, "log_every": 200, "eval_every": 4_000, "checkpoint_every": 4_000},
}

_REGULARIZED = {
    "model.mem_len": 300,
    "model.dropout": 0.06,
    "model.attention_dropout": 0.01,
    "deq.max_steps_jitter": 2,
}

_IFT = {"deq.solver": "broyden", "deq.max_steps": 35, "deq.pretrain_steps": 0}

_TINY = {
    "data.name": "pydoc",
    "data.path": "",
    "data.batch_size": 16,
    "data.seq_len": 32,
    "data.eval_batch_size": 8,
    "data.eval_seq_len": 32,
    "model.d_model": 96,
    "model.d_embed": 96,
    "model.n_head": 4,
    "model.d_head": 24,
    "model.cutoffs": (500, 1500),
    "model.div_value": 2,
    "model.mem_len": 32,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 20,
    "train.steps": 1500,
    "train.log_every": 50,
    "train.eval_every": 300,
    "train.checkpoint_every": 300,
}

_TINY_BLOCK = {"model.d_inner": 140, "model.pre_norm": True, "model.affine_norm": True}

VARIANTS = {
    "base": {},
    "reg": _REGULARIZED
    | {
        "deq.max_steps": 12,
        "deq.backward_max_steps": 13,
        "deq.jacobian_weight": 1.9,
        "deq.jacobian_frequency": 0.35,
        "deq.jacobian_increment_every": 35_000,
    },
    "preln_reg": _REGULARIZED
    | {
        "model.pre_norm": True,
        "deq.max_steps": 14,
        "deq.backward_max_steps": 14,
        "deq.jacobian_weight": 2.0,
        "deq.jacobian_frequency": 0.4,
        "deq.jacobian_increment_every": 30_000,
    },
    "ift": _IFT | {"deq.jacobian_through_equilibrium": True},
    "ift_jr": _IFT
    | {
        "deq.jacobian_weight": 0.1,
        "deq.jacobian_frequency": 0.4,
        "deq.jacobian_increment_every": 30_000,
        "deq.jacobian_through_equilibrium": True,
    },
    "deq_lm": {
        "model.d_inner": 14_800,
        "model.blocks": 3,
        "model.pre_norm": True,
        "model.affine_norm": True,
        "deq.solver": "picard",
        "deq.max_steps": 12,
        "deq.gradient": "unroll",
        "deq.pretrain_steps": 0,
        "optimizer.warmup_steps": 8_000,
        "train.steps": 150_000,
    },
    "explicit": {
        "model.name": "transformer_xl",
        "deq": None,
        "model.d_inner": 2_478,
        "model.blocks": 12,
        "model.pre_norm": True,
        "model.affine_norm": True,
    },
    "proposal": {
        "model.name": "proposal_deq",
        "model.d_inner": 2_478,
        "model.proposal_blocks": 11,
        "model.pre_norm": True,
        "model.affine_norm": True,
        "deq.max_steps": 16,
        "deq.pretrain_steps": 0,
    },
    "tiny": _TINY
    | {
        "model.d_inner": 384,
        "deq.max_steps": 16,
        "deq.backward_max_steps": 16,
        "deq.jacobian_weight": 1.0,
        "deq.jacobian_frequency": 0.4,
        "deq.pretrain_steps": 300,
        "optimizer.learning_rate": 1.5e-3,
    },
    "tiny_explicit": _TINY | {"model.name": "transformer_xl", "deq": None, "model.blocks": 2} | _TINY_BLOCK,
    "tiny_proposal": _TINY
    | {"model.name": "proposal_deq", "model.proposal_blocks": 1, "deq.max_steps": 16, "deq.pretrain_steps": 0}
    | _TINY_BLOCK,
}


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
