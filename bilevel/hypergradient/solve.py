r"""The heart of the library: one hypergradient, from a problem and a response.

.. math::
    dF/dλ = ∂_λ f
        + (∂w/∂λ)ᵀ ∇_w f
"""

from typing import Any

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params
from bilevel.ground.keys import check_key
from bilevel.ground.settings import check_settings_used, out_of_range
from bilevel.ground.status import Status, status_of, worst
from bilevel.hypergradient.base import Hypergradient, Response
from bilevel.hypergradient.judge import judged
from bilevel.problem.two_losses import Point, Problem
from bilevel.problem.validate import check_problem


def solve(
    problem: Problem,
    response: Response,
    params: Params,
    hparams: Hparams,
    *,
    inner_batch: Batch,
    outer_batch: Batch,
    state: Any = None,
    key: Key | None = None,
) -> Hypergradient:
    """The hypergradient of ``problem`` and the evidence for it, of arguments that were checked.

    Arguments, status and cost as :func:`~bilevel.hypergrad_solve`, which is the door to this.
    """
    w, pullback = response.vjp(problem, params, hparams, inner_batch, state, key=key)
    (value, aux), (g, direct) = problem.outer_grads(w, hparams, outer_batch)
    indirect, state, result, stats = pullback(g)
    grads = tree.add(direct, indirect)

    stats = {
        **stats,
        "direct_norm": tree.norm(direct),
        "indirect_norm": tree.norm(indirect),
    }
    result = worst(result, status_of(Status.ok, (out_of_range(response), Status.invalid_setting)))
    result = judged(value, g, params, grads, result, stats)
    w = w.params if isinstance(w, Point) else w
    return Hypergradient(value, aux, w, grads, direct, indirect, state, result, stats)


def check_solve(
    problem: Problem,
    response: Response,
    params: Params,
    hparams: Hparams,
    *,
    inner_batch: Batch,
    outer_batch: Batch,
    state: Any = None,
    key: Key | None = None,
) -> None:
    """Raise what is wrong with the arguments of :func:`solve`, at trace time."""
    check_settings_used(response, "response")
    check_key(key)
    check_problem(problem, params, hparams, inner_batch, outer_batch)
    check = getattr(response, "check", None)
    if check is not None:
        check(problem, params, hparams, inner_batch, outer_batch, state)
