"""Loops whose inner problem is solved as accurately as the outer progress deserves."""

from bilevel.outer.inexact.bo_rep import BoRepState as BoRepState
from bilevel.outer.inexact.bo_rep import bo_rep as bo_rep
from bilevel.outer.inexact.certificate import Certificate as Certificate
from bilevel.outer.inexact.certified import MaidState as MaidState
from bilevel.outer.inexact.hoag import HoagState as HoagState
from bilevel.outer.inexact.hoag import hoag as hoag
from bilevel.outer.inexact.maid import maid as maid
