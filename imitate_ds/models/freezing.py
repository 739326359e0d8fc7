"""What of a network does not learn: it has no gradient, and stays in evaluation mode whatever train() says."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import filter as matching

from torch import nn


def freeze(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Keep from learning what the shell patterns match; "*" matches dots too.

    Raises ValueError for a pattern that matches none of the names.
    """
    for pattern in patterns:
        matched = matching(parameters, pattern)
        if not matched:
            raise ValueError(
                f"model.freeze = {list(patterns)}: {pattern!r} matches no weight; {_near(pattern, parameters)}"
            )
        for name in matched:
            parameters[name].requires_grad_(False)


def set_modes(module: nn.Module, *, learns: bool) -> None:
    """Training mode for what learns. What has no parameters of its own, as dropout, goes with the module it is in; what has,
    and none of them learns, stays in evaluation mode: no BatchNorm may move."""
    of_all, own = list(module.parameters()), list(module.parameters(recurse=False))
    learns = any(parameter.requires_grad for parameter in of_all) if of_all else learns
    module.training = learns and (not own or any(parameter.requires_grad for parameter in own))
    for child in module.children():
        set_modes(child, learns=learns)


def _near(pattern: str, names: Mapping[str, nn.Parameter]) -> str:
    """What was meant, or else where names begin."""
    parts = [name.split(".") for name in names]
    places = dict.fromkeys(".".join(part[: i + 1]) for part in parts for i in range(len(part)))
    if near := difflib.get_close_matches(pattern.rstrip("*."), places, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(f'{name}*' for name in near)}?"
    return f"names begin with {', '.join(dict.fromkeys(part[0] for part in parts))}"
