"""The names that `import kvell` offers."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

import kvell


@pytest.fixture
def _collecting() -> Iterator[None]:
    """The collector is on again afterwards, whatever became of the test."""
    yield
    gc.enable()


def test_every_name_is_there_when_it_is_first_used() -> None:
    for name in kvell.__all__:
        assert getattr(kvell, name).__name__ == name
    assert set(dir(kvell)) == {*kvell.__all__, "__version__"}
    with pytest.raises(AttributeError, match=r"^module 'kvell' has no attribute 'Cash'$"):
        kvell.__getattr__("Cash")


def test_nothing_heavy_is_imported_before() -> None:
    code = "import sys, kvell, kvell.cli; print(*{'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("home", ["kvell.errors", "kvell.nowhere"])
def test_importing_leaves_the_collector_as_it_was(home: str, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvell._HOMES, "KvellError", home)
    (gc.enable if enabled else gc.disable)()
    try:
        kvell.__getattr__("KvellError")
    except ModuleNotFoundError:
        assert home == "kvell.nowhere"
    assert gc.isenabled() == enabled
