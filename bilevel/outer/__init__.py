"""How the hyperparameters move: bounds, and loops as pairs of pure functions."""

from bilevel.outer.constrain import Bound as Bound
from bilevel.outer.constrain import Free as Free
from bilevel.outer.constrain import Integer as Integer
from bilevel.outer.constrain import Interval as Interval
from bilevel.outer.constrain import Positive as Positive
from bilevel.outer.constrain import Simplex as Simplex
from bilevel.outer.constrain import Space as Space
