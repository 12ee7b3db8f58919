"""What the outer problem can be: validation, cross-validation, and estimates without such data.

Each objective is a value. ``outer`` and, where it is not your own, ``inner`` are losses of the
form ``loss(params, hparams, batch)``, for ``hypergrad_solve``, ``with_response`` and every outer
loop; ``init(params)`` makes the parameters that they read, ``inner_batch(data)`` and
``outer_batch(data)`` the batches.
"""

from bilevel.objectives.cross_validation import CrossValidation as CrossValidation
from bilevel.objectives.cross_validation import FoldScores as FoldScores
from bilevel.objectives.elbo import DataEmphasizedELBO as DataEmphasizedELBO
from bilevel.objectives.elbo import Variational as Variational
from bilevel.objectives.evidence import LaplaceEvidence as LaplaceEvidence
from bilevel.objectives.fine_tuned import FineTuned as FineTuned
from bilevel.objectives.folds import k_folds as k_folds
from bilevel.objectives.held_out import HeldOut as HeldOut
from bilevel.objectives.hyper_prior import Deviations as Deviations
from bilevel.objectives.hyper_prior import HyperPrior as HyperPrior
from bilevel.objectives.leave_one_out import LeaveOneOut as LeaveOneOut
from bilevel.objectives.strength import StrengthChoice as StrengthChoice
from bilevel.objectives.strength import choose_strength as choose_strength
from bilevel.objectives.sure import SURE as SURE
