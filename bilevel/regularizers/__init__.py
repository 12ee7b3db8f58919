"""What users tune: penalties and randomness with traced strengths, one for all or one per example.

Arrays have their examples on the leading axis. A strength is a scalar or ``(B,)``; it may be
traced, and is checked where its value is known. Functions that draw take a key first.
"""

from bilevel.regularizers import prox as prox
from bilevel.regularizers.activations import activation_penalty as activation_penalty
from bilevel.regularizers.activations import (
    temporal_activation_penalty as temporal_activation_penalty,
)
from bilevel.regularizers.color import color_jitter as color_jitter
from bilevel.regularizers.cutout import cutout as cutout
from bilevel.regularizers.cutout import cutout_mask as cutout_mask
from bilevel.regularizers.dropout import dropout as dropout
from bilevel.regularizers.dropout import dropout_mask as dropout_mask
from bilevel.regularizers.dropout import embedding_dropout as embedding_dropout
from bilevel.regularizers.dropout import locked_dropout as locked_dropout
from bilevel.regularizers.dropout import weight_drop as weight_drop
from bilevel.regularizers.dropout import word_mask as word_mask
from bilevel.regularizers.mixup import label_smoothing as label_smoothing
from bilevel.regularizers.mixup import mixup as mixup
from bilevel.regularizers.noise import input_noise as input_noise
from bilevel.regularizers.noise import input_scaling as input_scaling
from bilevel.regularizers.penalties import l1_penalty as l1_penalty
from bilevel.regularizers.penalties import l2_penalty as l2_penalty
from bilevel.regularizers.penalties import penalty_init as penalty_init
