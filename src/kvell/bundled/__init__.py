"""The small model that comes with the package."""

from pathlib import Path


def bundled_model_path() -> Path:
    """The directory of the bundled model."""
    return Path(__file__).parent / "model"
