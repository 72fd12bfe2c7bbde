"""Constants that are not a command's options, and the checks for plain numbers.

Importing it must stay cheap: ``kmerge-mlx --help`` does.
"""

from __future__ import annotations

import math

MAX_BLOCKS = 131_072  # most distinct blocks in use at once: 512k tokens at K=4
# Blocks that the encoder reads at once: its activations stay near 30 MB at D=896 for any T.
BLOCKS_PER_CHUNK = 512
MAX_RANK = 65_536  # of LoRA; more than any model is wide, and a stranger's file may say anything
CONTEXT_SEPARATOR = "\n\n"  # between two FILEs, and between the FILEs and the ``-p`` text
DATA_SEED = 42  # of every draw and split of data, as in the paper
CARRIED = "kmerge"  # the sub-folder of a model folder that holds the adapter it carries

# Most positions whose log-probabilities are compared, most memory to keep them in, and the
# positions whose logits are made at once: 39 MB at V = 151,936.
DRIFT_POSITIONS, DRIFT_BYTES, DRIFT_CHUNK = 1024, 256 << 20, 64

# Share of a Mac's unified memory that `kmerge-mlx info` counts on. Metal recommends a working set
# for its GPU: owners report from two thirds (8 GB) to five sixths (128 GB) of the memory.
USABLE_SHARE = 2 / 3
# How often a machine is taken to multiply, at most, while it reads a byte of memory: by published
# figures roughly 20 for the GPUs of M1 to M4, 60 for M5's; docs/performance.md's CPU: 5.
MULTIPLICATIONS_PER_BYTE = 64


def is_int(value: object, low: int = 0) -> bool:
    """Whether ``value`` is an int (and not a bool) of at least ``low``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float (and not a bool)."""
    # Arithmetic here cannot use an int past float64.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )
