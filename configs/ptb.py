"""Penn Treebank, word level, vocabulary 10,000: DEQ-Transformers of 24.0M parameters, and what they are compared with.

    python -m deq_flax.main --config configs/ptb.py[:VARIANT] --workdir DIR

| variant | what | test perplexity |
|---|---|---|
| base | Anderson and Jacobian regularisation; 40,000 steps, about 96 epochs | published: none; not trained here |
| ift | Broyden both ways, no regularisation, no pretraining | not trained here |
| reversible | a reversible iteration instead of solver and adjoint | not trained here |
| deq_lm | three blocks in f, 12 evaluations unrolled, no solve | not trained here |
| explicit | no equilibrium: a Transformer-XL of 8 such blocks | not trained here |
| short | 600 steps of a model of 1.6M, on two CPU cores | measured: see README |

For comparison: DEQ-TrellisNet with 24M parameters 57.1, a heavily regularised Transformer-XL with 24M 54.5.

Parameters of `base`, with d = 480, one softmax over all words and its matrix tied to the embedding:
    embedding and softmax  10,000 d + 10,000                  4.810M
    attention              3 d^2 (q, k, v) + d^2 (positions) + d^2 (output)   1.152M
    input injection        3 d^2 + 3 d                        0.693M
    feed-forward           2 d 18,000 + 18,000 + d           17.298M
    biases, norm gains     attention 3 d, weight norm 18,000 + 6 d   0.022M
    in all                                                   23.975M
Cost: 40,000 steps of 32 x 70 tokens. The corpus is tiny for that many parameters, hence the dropout, the Jacobian
regularisation and the running average.
"""

from ml_collections import ConfigDict

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
        "task": "explicit_language",
        "model.d_inner": 1_285,
        "model.blocks": 8,
        "model.pre_norm": True,
        "model.affine_norm": True,
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


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "language",
            "data": {
                "name": "ptb",
                "path": "data/ptb",  # the folder of the three splits
                "cache": "",  # folder for the encoded corpus; empty: ~/.cache/deq_flax
                "batch_size": 32,
                "seq_len": 70,
                "eval_batch_size": 10,
                "eval_seq_len": 70,
            },
            "model": {
                "vocab_size": 0,  # 0: as many words as the corpus has (10,000)
                "d_model": 480,
                "d_embed": 480,
                "n_head": 8,
                "d_head": 60,
                "d_inner": 18_000,
                "blocks": 1,  # in f, one after the other; of an explicit model, its layers
                "cutoffs": (),
                "div_value": 1,
                "pre_norm": False,
                "affine_norm": False,  # with pre_norm: norms with parameters, one more after the attention
                "weight_norm": True,
                "mem_len": 70,
                "local_size": 0,  # attention span in tokens; 0 stands for 1000
                "dropout": 0.4,
                "attention_dropout": 0.1,
                "output_dropout": "features",  # what a mask on the output drops: features, or whole tokens
                "dtype": "float32",  # of the layer's arithmetic; the solver's state is float32 always
            },
            "deq": {
                "solver": "anderson",
                "tol": 1e-3,
                "max_steps": 16,
                "stop": "relative",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 16,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.5,
                "jacobian_frequency": 0.3,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 2,
                "pretrain_steps": 8_000,  # steps with the cell unrolled ..
                "pretrain_layers": 2,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # of a Jacobian loss in pretraining; 0: none
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 2.5e-4,
                "warmup_steps": 2_000,
                "schedule": "cosine",
                "clip_norm": 0.25,
                "weight_decay": 1.2e-6,
                "momentum": 0.0,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 40_000,
                "seed": 0,
                "log_every": 100,
                "eval_every": 1_000,
                "checkpoint_every": 1_000,
                "accumulate": 1,  # micro-batches to a step; batch_size counts all of them
                "ema_decay": 0.999,  # running average of the parameters, for evaluation; 0: none
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
        raise ValueError(f"unknown variant {variant!r} of ptb; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    if config.task == "explicit_language":
        del config.deq
    return config.lock()
