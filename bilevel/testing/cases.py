"""All cases, built once."""

import functools

import jax
import numpy as np

from bilevel.testing.case import Case
from bilevel.testing.conditions import equilibrium_case, kkt_case, lasso_case
from bilevel.testing.linear_models import (
    logistic_cases,
    multi_output_case,
    ridge_cases,
    softmax_case,
)
from bilevel.testing.other_models import least_squares_case, network_case, quadratic_case


def cases() -> tuple[Case, ...]:
    """Problems whose hypergradient is known exactly, each at its inner minimum.

    Ridge regression tuned through one penalty, a penalty per parameter, data weights and labels;
    a multi-output regression with fewer outputs than parameters; logistic regression with one
    penalty and one per parameter; softmax regression with a penalty per weight; the general
    quadratic pair; least squares in both levels; a two-layer network. In every one the inner
    variable is a tree whose leaves the Hessian couples, and the outer loss depends on the
    hyperparameters directly. :meth:`Case.astype` gives them in a narrower dtype.

    Raises:
      RuntimeError: without ``jax_enable_x64``: the truth is float64.
    """
    _require_double()
    return _all_cases()


def condition_cases() -> tuple[Case, ...]:
    """Inner problems that are no smooth loss, each at its solution: :func:`cases` for conditions.

    An equilibrium (:class:`~bilevel.FixedPoint`) and KKT conditions (:class:`~bilevel.Root`),
    whose systems are not symmetric; a lasso with one strength per weight and an elastic net
    (:class:`~bilevel.Composite`, with the tag ``symmetric``), with weights at zero.

    Raises:
      RuntimeError: as :func:`cases`.
    """
    _require_double()
    return _condition_cases()


def _require_double() -> None:
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError(
            "bilevel.testing.cases() needs float64 for its exact values: call "
            "jax.config.update('jax_enable_x64', True) first, and `case.astype(...)` to test a "
            "method in a narrower dtype."
        )


@functools.cache
def _all_cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(0)
    return (
        *ridge_cases(rng),
        multi_output_case(rng),
        *logistic_cases(rng),
        softmax_case(rng),
        quadratic_case(rng),
        least_squares_case(rng),
        network_case(rng),
    )


@functools.cache
def _condition_cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(1)
    return equilibrium_case(rng), kkt_case(rng), lasso_case(rng), lasso_case(rng, ridge=0.5)
