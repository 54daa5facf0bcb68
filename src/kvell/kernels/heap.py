"""Memory of intermediate results on the CPU.

glibc takes blocks above a threshold from the system and gives them back as soon as they are freed, so every new
intermediate result of a long step costs page faults: on a virtual machine ten times the arithmetic of a norm over
2,048 tokens of 256 channels. The threshold starts at 128 KiB and rises, up to 32 MiB, to the largest block that was
freed so far (mallopt(3), M_MMAP_THRESHOLD). Freeing one large block, never touched, is all that it takes for the
memory of one result to serve the next. At most twice that block's size stays with the process.
"""

from functools import cache

import torch

LARGEST_KEPT = 31 * 2**20


@cache
def keep_freed_memory() -> None:
    """Once per process. Elsewhere than under glibc, or where its variables are set by hand, this changes nothing."""
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)
