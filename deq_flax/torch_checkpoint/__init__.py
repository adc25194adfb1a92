"""PyTorch's files without PyTorch: read them, map their names to our modules, write them. Needs numpy."""

from deq_flax.torch_checkpoint.families import FAMILIES, family_of, task_of
from deq_flax.torch_checkpoint.mapping import Family, Slot, convert_tensors, export_tensors, match, slots
from deq_flax.torch_checkpoint.reader import TensorFile, open_tensors
from deq_flax.torch_checkpoint.writer import write_state_dict
