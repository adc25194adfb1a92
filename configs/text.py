"""Your own text, split into pieces of words: models whose explicit blocks propose and whose equilibrium refines.

    python -m deq_flax.tokenize --input FILES --vocab_size 8000 data/text
    python -m deq_flax.main --config configs/text.py[:VARIANT] --workdir DIR

| variant | what | valid perplexity, published | measured |
|---|---|---|---|
| base | 3 + 1 blocks of 256 features, memory of 128 tokens; 5.2M parameters with 8,000 pieces | none | not trained here |
| explicit | the same 4 blocks without an equilibrium | none | not trained here |
| large | 7 + 1 blocks of 1,024 features, 134M parameters with 32,768 pieces | 18.30, a Transformer 21.48 | not trained here |

The blocks are those of language models of today: RMS norms before attention and feed-forward, rotary positions, SwiGLU, no
weight normalization. The numbers are those of Fein-Ashley and Rashidinejad (2026, arXiv:2605.12466) for 11.2 billion tokens of
FineWeb-Edu in batches of 256 x 2,048. What they trained differs from `large` in the optimizer (Muon for the matrices), squared
ReLU instead of SwiGLU, normalized queries and keys, and the gradient: a Neumann series of two terms, `deq.gradient=neumann` and
`deq.gradient_options.terms=2`, where ours is exact.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "language",
    "data": {"name": "tokens", "path": "data/text", "batch_size": 32},
    "model": {
        "name": "transformer_xl",
        "d_model": 256,
        "d_embed": 256,
        "n_head": 4,
        "d_head": 64,
        "d_inner": 683,
        "mem_len": 128,
        "pre_norm": True,
        "affine_norm": True,
        "norm": "rms",
        "positions": "rotary",
        "gated": True,
        "weight_norm": False,
        "dropout": 0.1,
        "output_dropout": "features",
    },
    "optimizer": {"name": "adamw", "warmup_steps": 200, "clip_norm": 1.0, "weight_decay": 0.1, "beta2": 0.95},
    "train": {"steps": 10_000},
}

_PROPOSAL = {"model.name": "proposal_deq", "model.proposal_blocks": 3, "deq.solver": "anderson", "deq.max_steps": 16}

VARIANTS = {
    "base": _PROPOSAL,
    "explicit": {"model.blocks": 4},
    "large": _PROPOSAL
    | {
        "data.batch_size": 256,
        "data.seq_len": 2_048,
        "data.eval_seq_len": 2_048,
        "model.d_model": 1_024,
        "model.d_embed": 1_024,
        "model.n_head": 8,
        "model.d_head": 128,
        "model.d_inner": 2_730,
        "model.proposal_blocks": 7,
        "model.mem_len": 0,
        "model.local_size": 2_048,
        "model.dropout": 0.0,
        "model.dtype": "bfloat16",
        "deq.max_steps": 64,
        "deq.tol": 3e-3,
        "optimizer.learning_rate": 6e-4,
        "optimizer.warmup_steps": 1_000,
        "train.steps": 21_400,
        "train.accumulate": 8,
    },
}


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
