"""Optimizers: rates that follow hypergradients of their own, momentum for games, Gauss–Newton."""

from bilevel.outer.optimizers.complex_momentum import complex_momentum as complex_momentum
from bilevel.outer.optimizers.descent import hypergradient_descent as hypergradient_descent
from bilevel.outer.optimizers.fedhyper import fedhyper_client as fedhyper_client
from bilevel.outer.optimizers.fedhyper import fedhyper_global as fedhyper_global
from bilevel.outer.optimizers.fedhyper import fedhyper_server as fedhyper_server
from bilevel.outer.optimizers.gauss_newton import gauss_newton as gauss_newton
