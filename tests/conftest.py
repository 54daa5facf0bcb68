"""What holds for every test: checked shapes, one thread, a fixed seed."""

from collections.abc import Iterator

import jaxtyping

# Before anything imports kvell: modules already imported would go unchecked.
CHECKED = ["kvell.cache", "kvell.kernels", "kvell.layers", "kvell.model", "kvell.step", "kvell.generation.sampling"]
jaxtyping.install_import_hook(CHECKED, "shape_checks.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
