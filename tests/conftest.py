"""What holds for every test: checked shapes, one thread, a fixed seed."""

import os
from collections.abc import Iterator

import jaxtyping
from shape_checks import modules_with_shapes

# Before anything imports kvell: modules already imported would go unchecked.
jaxtyping.install_import_hook(modules_with_shapes(), "shape_checks.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Without a GPU Triton's kernels are interpreted; Triton asks for this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
