"""imitate_ds: hierarchical vision-language pre-training of chest X-ray encoders."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imitate_ds.hub import PretrainedImitate, load_model
    from imitate_ds.predictor import Predictor, load_predictor

try:
    __version__ = version("imitate-ds")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Predictor", "PretrainedImitate", "__version__", "load_model", "load_predictor"]


def __getattr__(name: str):
    """Import the model only when asked for: `imitate-ds --help` and the data tools need neither timm nor torch."""
    if name in ("load_model", "PretrainedImitate"):
        from imitate_ds import hub

        return getattr(hub, name)
    if name in ("load_predictor", "Predictor"):
        from imitate_ds import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'imitate_ds' has no attribute {name!r}")
