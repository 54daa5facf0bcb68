"""What `make` says where it cannot do what is asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_tests_name_the_compiler_that_they_lack_before_anything_else(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path / 'venv'}"],
        env=environment | {"CXX": "no-such-compiler"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the tests need a C++ compiler, and no-such-compiler does not run here: install g++" in line
    assert list(tmp_path.iterdir()) == []
