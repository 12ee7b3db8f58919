"""The hypergradient: responses, and the transforms that use them."""

from bilevel.hypergradient.base import Hypergradient as Hypergradient
from bilevel.hypergradient.base import Pullback as Pullback
from bilevel.hypergradient.base import Response as Response
from bilevel.hypergradient.best_response import BestResponse as BestResponse
from bilevel.hypergradient.best_response import BestResponseState as BestResponseState
from bilevel.hypergradient.evolution import Evolution as Evolution
from bilevel.hypergradient.finite_difference import FiniteDifference as FiniteDifference
from bilevel.hypergradient.implicit import Implicit as Implicit
from bilevel.hypergradient.transform import hypergrad as hypergrad
from bilevel.hypergradient.transform import hypergrad_init as hypergrad_init
from bilevel.hypergradient.transform import hypergrad_solve as hypergrad_solve
from bilevel.hypergradient.transform import value_and_hypergrad as value_and_hypergrad
from bilevel.hypergradient.unroll import Unroll as Unroll
from bilevel.hypergradient.unroll_map import UnrollMap as UnrollMap
from bilevel.hypergradient.with_response import with_response as with_response
