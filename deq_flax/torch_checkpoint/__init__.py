"""PyTorch checkpoint files without PyTorch: read them, map their tensors to our models and back, write them."""

from deq_flax.torch_checkpoint.families import FAMILIES, family_name, family_of, head_of, model_of
from deq_flax.torch_checkpoint.mapping import (
    Family,
    convert_tensors,
    export_tensors,
    get_arrays,
    mismatches,
    set_arrays,
    slots,
)
from deq_flax.torch_checkpoint.reader import TensorFile, open_tensors
from deq_flax.torch_checkpoint.writer import write_state_dict

__all__ = [
    "FAMILIES",
    "Family",
    "TensorFile",
    "convert_tensors",
    "export_tensors",
    "family_name",
    "family_of",
    "get_arrays",
    "head_of",
    "mismatches",
    "model_of",
    "open_tensors",
    "set_arrays",
    "slots",
    "write_state_dict",
]
