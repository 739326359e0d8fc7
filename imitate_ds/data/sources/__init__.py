"""Where studies come from: one module per collection, and one door to all of them."""

from pathlib import Path

from imitate_ds.data.sources.base import Source

SOURCES = ("openi", "mimic-cxr", "chexpert-plus", "table", "phantom")


def open_source(name: str, root: Path | None, **options) -> Source:
    """The source called name, reading from root; options go to its class.

    Raises ValueError for an unknown name or a missing root, FileNotFoundError where root has not the expected layout.
    """
    if name == "phantom":
        from imitate_ds.data.sources.phantom import PhantomSource

        return PhantomSource(**options)
    if name not in SOURCES:
        raise ValueError(f"source = {name!r}: must be one of {', '.join(SOURCES)}")
    if root is None:
        raise ValueError(f"source {name}: needs --root, the folder it was downloaded to")
    root = Path(root)
    if name == "openi":
        from imitate_ds.data.sources.openi import OpenISource

        return OpenISource(root, **options)
    if name == "mimic-cxr":
        from imitate_ds.data.sources.mimic_cxr import MimicCxrSource

        return MimicCxrSource(root, **options)
    if name == "chexpert-plus":
        from imitate_ds.data.sources.chexpert_plus import CheXpertPlusSource

        return CheXpertPlusSource(root, **options)
    from imitate_ds.data.sources.table import TableSource

    return TableSource(root, **options)
