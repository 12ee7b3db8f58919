"""First-order penalty methods: hypergradients as differences of training gradients."""

from bilevel.outer.penalty.bome import bome as bome
from bilevel.outer.penalty.f2sa import f2sa as f2sa
from bilevel.outer.penalty.loop import PenaltyState as PenaltyState
from bilevel.outer.penalty.pbgd import pbgd as pbgd
