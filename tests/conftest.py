"""What holds for every test: checked shapes, one thread, a fixed seed."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jaxtyping

KVELL = Path(find_spec("kvell").origin).parent  # type: ignore[union-attr, arg-type]
# Before anything imports kvell: modules already imported would go unchecked. What is in Triton is not Python.
CHECKED = ["kvell.cache", "kvell.layers", "kvell.model", "kvell.step", "kvell.generation.sampling"]
CHECKED += [f"kvell.kernels.{file.stem}" for file in (KVELL / "kernels").glob("*.py")]
jaxtyping.install_import_hook(CHECKED, "shape_checks.checked")

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
