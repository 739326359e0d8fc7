"""Where the command line writes: results to standard output, what is wrong to standard error."""

from rich.console import Console

console, errors = Console(), Console(stderr=True)


def say(text: str) -> None:
    """One line as it is: folder names may hold brackets, and are longer than a terminal is wide."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
