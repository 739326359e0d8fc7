"""Where studies come from: one module per collection, and one door to all of them."""

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from imitate_ds.data.sources.base import Source

# name -> module and class; a source is imported when it is asked for
SOURCES = {
    "openi": ("openi", "OpenISource"),
    "mimic-cxr": ("mimic_cxr", "MimicCxrSource"),
    "chexpert-plus": ("chexpert_plus", "CheXpertPlusSource"),
    "chexpert": ("chexpert", "CheXpertSource"),
    "chestxray14": ("chestxray14", "ChestXray14Source"),
    "rsna": ("rsna", "RsnaSource"),
    "siim": ("siim", "SiimSource"),
    "covidx": ("covidx", "CovidxSource"),
    "object-cxr": ("object_cxr", "ObjectCxrSource"),
    "vindr": ("vindr", "VinDrSource"),
    "covid-cxr": ("covid_cxr", "CovidCxrSource"),
    "table": ("table", "TableSource"),
    "phantom": ("phantom", "PhantomSource"),
}
# what the values of an option must be, by the first type that its class names
OPTION_RULES = {int: "a whole number", float: "a number", str: "a text", Mapping: "a mapping of roles to columns"}


def open_source(name: str, root: Path | None, **options: object) -> Source:
    """The source called name, reading from root (None for phantom, which draws its studies); options go to its class.

    Raises ValueError for an unknown name or option or a missing root, FileNotFoundError where root has another layout.
    """
    if name not in SOURCES:
        raise ValueError(f"source = {name!r}: must be one of {', '.join(SOURCES)}")
    module, class_name = SOURCES[name]
    make = getattr(import_module(f"{__name__}.{module}"), class_name)
    hints = get_type_hints(make.__init__)
    known = [option for option in signature(make).parameters if option != "root"]
    for option in options:
        if option not in known:
            raise ValueError(f"{option} is not an option of source {name}; it has: {', '.join(known) or 'none'}")
        _check_option(option, options[option], hints[option])
    if name == "phantom":
        return make(**options)
    if root is None:
        raise ValueError(f"source {name}: needs --root, the folder it was downloaded to")
    if not Path(root).exists():
        raise FileNotFoundError(f"source {name}: --root {root} does not exist")
    return make(Path(root), **options)


def _check_option(name: str, value: object, hint: Any) -> None:
    """Raises ValueError unless value is of the type that hint names, or of one in its union; an int passes for a float."""
    kinds = [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
    if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else tuple(kinds)):
        raise ValueError(f"option {name} = {value!r}: must be {OPTION_RULES[kinds[0]]}")
