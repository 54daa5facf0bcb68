"""`python -m kvell.train CONFIG` is `kvell train CONFIG`, for torchrun:

torchrun --nproc-per-node 8 -m kvell.train CONFIG
"""

import sys

from kvell.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
