"""Tests you can run on a solver or a response of your own.

:func:`cases` are problems with a known hypergradient; :func:`check_solver`, :func:`check_response`
and :func:`check_estimator` hold a method against them and raise :class:`CheckFailed`;
:func:`wrong_estimators` are mistakes that any such suite must reject, to test the tests.
"""

from bilevel.testing.case import Case as Case
from bilevel.testing.case import Exact as Exact
from bilevel.testing.case import flatten as flatten
from bilevel.testing.case import unflatten as unflatten
from bilevel.testing.cases import cases as cases
from bilevel.testing.check import CheckFailed as CheckFailed
from bilevel.testing.check import check_estimator as check_estimator
from bilevel.testing.check import check_response as check_response
from bilevel.testing.check import check_solver as check_solver
from bilevel.testing.check import count_products as count_products
from bilevel.testing.check import relative_error as relative_error
from bilevel.testing.wrong import WrongEstimator as WrongEstimator
from bilevel.testing.wrong import wrong_estimators as wrong_estimators
