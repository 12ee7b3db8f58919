"""Loops whose inner problem is solved as accurately as the outer progress deserves."""

from bilevel.outer.inexact.hoag import HoagState as HoagState
from bilevel.outer.inexact.hoag import hoag as hoag
