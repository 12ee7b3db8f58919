"""Curvature from the layers of a model: what their inputs and output gradients tell about J."""

from bilevel.problem.layers.dual import block_root as block_root
from bilevel.problem.layers.dual import dual_kernel as dual_kernel
from bilevel.problem.layers.dual import ordered_outputs as ordered_outputs
from bilevel.problem.layers.kronecker import kronecker as kronecker
from bilevel.problem.layers.outputs import output_kernel as output_kernel
