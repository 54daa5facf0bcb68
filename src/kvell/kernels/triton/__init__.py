"""Kernels in Triton, for CUDA devices: one file for each, named as the file of its reference.

Nothing here is imported before kernels/choice.py has found Triton installed. Products are accumulated and softmaxes
taken in fp32; block sizes are chosen by reasoning where no comment says that they were measured.
"""

import triton

# Kernels are made for the interpreter, or not, when they are defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)
