"""Drivers of outer loops on the host: data, steps, logs, checkpoints, and what to return."""

from bilevel.run.driver import fit as fit
from bilevel.run.result import FitResult as FitResult
from bilevel.run.result import NonfiniteError as NonfiniteError
from bilevel.run.trust import Trust as Trust
