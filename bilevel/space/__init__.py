"""Where hyperparameters may lie: named bounds, by a change of variables."""

from bilevel.space.bounds import Bound as Bound
from bilevel.space.bounds import Free as Free
from bilevel.space.bounds import Integer as Integer
from bilevel.space.bounds import Interval as Interval
from bilevel.space.bounds import Positive as Positive
from bilevel.space.bounds import Simplex as Simplex
from bilevel.space.space import Space as Space
