"""WikiText-103, word level: the DEQ-Transformer of about 98M parameters, and a small one to try things with.

    python -m deq_flax.main --config configs/wt103.py[:VARIANT] --workdir DIR

| variant | what | test perplexity, published (memory) | measured |
|---|---|---|---|
| base | Anderson forward, Broyden backward, unrolled pretraining | 23.8; released weights 23.1 (300) | see README |
| reg | Jacobian regularisation, 12 evaluations | 24.9; 23.8 at sequence length 300 | see README |
| preln_reg | the same with LayerNorm before the sublayers | 24.5 | see README |
| ift | Broyden both ways, no pretraining | 23.78 (150), 23.31 (480) | see README |
| ift_jr | ift with Jacobian regularisation | 23.67 (150), 23.16 (480) | see README |
| deq_lm | three blocks in f, 12 evaluations unrolled, no solve | 22.34 (150), 21.85 (480) | not trained here |
| explicit | no equilibrium: a Transformer-XL of 12 such blocks and as many parameters | none | not trained here |
| tiny | 4 heads of 24 on English that comes with Python, no download | none | see README |

Cost: 300,000 steps of 56 x 150 tokens; the originals took 2.8 to 3.1 times a Transformer-XL's training time (1.5 with
Jacobian regularisation) and 3.7 to 3.9 GB at batch 15. `tiny` is meant for a few minutes on two CPU cores.
The numbers are those of Bai et al. 2019 and 2021 (base, reg, preln_reg) and of TorchDEQ's recipes (ift, ift_jr, deq_lm).
"""

from ml_collections import ConfigDict

_REGULARISED = {
    "model.mem_len": 300,
    "model.dropout": 0.06,
    "model.attention_dropout": 0.01,
    "deq.max_steps_jitter": 2,
}

_IFT = {"deq.solver": "broyden", "deq.max_steps": 35, "deq.pretrain_steps": 0}

VARIANTS = {
    "base": {},
    "reg": _REGULARISED
    | {
        "deq.max_steps": 12,
        "deq.backward_max_steps": 13,
        "deq.jacobian_weight": 1.9,
        "deq.jacobian_frequency": 0.35,
        "deq.jacobian_increment_every": 35_000,
    },
    "preln_reg": _REGULARISED
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
        "task": "explicit_language",
        "model.d_inner": 2_478,
        "model.blocks": 12,
        "model.pre_norm": True,
        "model.affine_norm": True,
    },
    "tiny": {
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
        "model.d_inner": 384,
        "model.cutoffs": (500, 1500),
        "model.div_value": 2,
        "model.mem_len": 32,
        "deq.max_steps": 16,
        "deq.backward_max_steps": 16,
        "deq.jacobian_weight": 0.3,
        "deq.jacobian_frequency": 0.4,
        "deq.pretrain_steps": 100,
        "optimizer.learning_rate": 2e-3,
        "optimizer.warmup_steps": 20,
        "train.steps": 1500,
        "train.log_every": 50,
        "train.eval_every": 300,
        "train.checkpoint_every": 300,
    },
}


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "language",
            "data": {
                "name": "wt103",
                "path": "data/wikitext-103",  # the folder of the three splits
                "cache": "",  # folder for the encoded corpus; empty: ~/.cache/deq_flax
                "batch_size": 56,
                "seq_len": 150,
                "eval_batch_size": 16,
                "eval_seq_len": 150,
            },
            "model": {
                "vocab_size": 0,  # 0: as many words as the corpus has (267,735)
                "d_model": 700,
                "d_embed": 700,
                "n_head": 10,
                "d_head": 70,
                "d_inner": 48_000,
                "blocks": 1,  # in f, one after the other; of an explicit model, its layers
                "cutoffs": (20_000, 40_000, 200_000),
                "div_value": 4,
                "pre_norm": False,
                "affine_norm": False,  # with pre_norm: norms with parameters, one more after the attention
                "weight_norm": True,
                "mem_len": 150,
                "local_size": 0,  # attention span in tokens; 0 stands for 1000
                "dropout": 0.05,
                "attention_dropout": 0.0,
                "output_dropout": "tokens",  # what a mask on the output drops: whole tokens, as published, or features
                "dtype": "float32",  # of the layer's arithmetic; the solver's state is float32 always
            },
            "deq": {
                "solver": "anderson",
                "tol": 1e-3,
                "max_steps": 30,
                "stop": "relative",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 35,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.0,
                "jacobian_frequency": 0.0,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 0,
                "pretrain_steps": 32_000,  # steps with the cell unrolled ..
                "pretrain_layers": 2,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # of a Jacobian loss in pretraining; 0: none
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 2.5e-4,
                "warmup_steps": 16_000,
                "schedule": "cosine",
                "clip_norm": 0.25,
                "weight_decay": 0.0,
                "momentum": 0.0,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 300_000,
                "seed": 0,
                "log_every": 200,
                "eval_every": 4_000,
                "checkpoint_every": 4_000,
                "accumulate": 1,  # micro-batches to a step; batch_size counts all of them
                "ema_decay": 0.0,  # running average of the parameters, for evaluation; 0: none
                "max_skipped": 10,  # non-finite steps in a row that are skipped before giving up
            },
            "eval": {
                "spectral_radius": False,  # report that of f at the equilibria of the first batch
                "max_steps_sweep": (),  # limits on evaluations to evaluate with besides, for a table of score against them
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: the devices that are left
            "checkpoint": {"keep_latest": 2, "keep_best": 1, "init_from": ""},
        }
    )


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of wt103; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    if config.task == "explicit_language":
        del config.deq
    return config.lock()
