"""Tests you can run on a solver, a response or an outer loop of your own.

:func:`cases` are problems with a known hypergradient, :func:`condition_cases` those whose inner
problem is not a smooth loss; :func:`check_solver`, :func:`check_response`
and :func:`check_estimator` hold a method against them, :func:`check_algorithm` holds an outer loop
against its contract, and all raise :class:`CheckFailed`. :func:`wrong_estimators` are mistakes that
any such suite must reject, to test the tests.
"""

from bilevel.testing.case import Case as Case
from bilevel.testing.case import Exact as Exact
from bilevel.testing.case import flatten as flatten
from bilevel.testing.case import unflatten as unflatten
from bilevel.testing.cases import cases as cases
from bilevel.testing.cases import condition_cases as condition_cases
from bilevel.testing.loops import check_algorithm as check_algorithm
from bilevel.testing.methods import CheckFailed as CheckFailed
from bilevel.testing.methods import check_estimator as check_estimator
from bilevel.testing.methods import check_response as check_response
from bilevel.testing.methods import check_solver as check_solver
from bilevel.testing.methods import count_products as count_products
from bilevel.testing.methods import relative_error as relative_error
from bilevel.testing.wrong import WrongEstimator as WrongEstimator
from bilevel.testing.wrong import wrong_condition_estimators as wrong_condition_estimators
from bilevel.testing.wrong import wrong_estimators as wrong_estimators
