"""``jax.grad`` for hyperparameters.

The modules stand in floors, and each imports only from those below it (see ``README.md`` in
this folder): the problem, the linear solve, the hypergradient, the outer update.
"""

import lazy_loader as _lazy_loader

# The public names stand in ``__init__.pyi``, and each is imported when it is first used: importing
# all of them takes as long as a third of JAX does.
__getattr__, _names, __all__ = _lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"]
