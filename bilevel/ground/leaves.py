"""Leaves of a tree by name: what ``leaves="kernel"`` means."""

from collections.abc import Sequence
from typing import Any

from bilevel.ground.tree import paths


def select(
    tree: Any, names: str | Sequence[str] | None, argument: str = "leaves"
) -> list[tuple[str, Any]]:
    """``(path, leaf)`` of the leaves whose path contains one of ``names``; all if ``None``.

    ``argument`` is what the caller calls ``names``.

    Raises:
      ValueError: a name that no path contains, with the paths there are.
    """
    found = paths(tree, "")
    if names is None:
        return found
    names = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`{argument}` must be parts of the paths of leaves (strings), got {names!r}."
        )
    for name in names:
        if not any(name in path for path, _ in found):
            raise ValueError(
                f"`{argument}`: no leaf has {name!r} in its path; use a part of one of "
                f"{', '.join(path or '(the tree is one leaf)' for path, _ in found)}."
            )
    return [(path, leaf) for path, leaf in found if any(name in path for name in names)]
