"""Memory-mapped `.npy` files, whose headers are checked before anything is done."""

from pathlib import Path

import numpy as np

from deq_flax.untrusted.files import check_regular

MAX_HEADER = 10_000
"""Most bytes of a header; NumPy writes 118 for a one-dimensional array."""


def map_npy(path: Path) -> np.ndarray:
    """Map the array of an `.npy` file.

    Raises:
        OSError: the file cannot be read, or is no ordinary file.
        ValueError: it is damaged, or no array of numbers.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(12)
    # The length has 2 bytes in version 1, 4 in later ones; NumPy would read the whole header before it checks the length.
    if (
        not start.startswith(b"\x93NUMPY")
        or int.from_bytes(start[8:10] if start[6:7] == b"\x01" else start[8:12], "little") > MAX_HEADER
    ):
        raise ValueError("it does not begin as one")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # any of many types: the header is Python source, read as a literal
        raise ValueError(" ".join(str(error).split())[:160] or type(error).__name__) from error
