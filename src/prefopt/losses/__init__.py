"""Losses. Importing this package declares all of them in ``LOSSES``; a loss of your own imports its helpers from here.

>>> from prefopt.losses import logistic
>>> def soft(margin_P, *, temperature=1.0):
...     return logistic(margin_P / temperature)
"""

from prefopt.losses import labels as labels
from prefopt.losses import pairs as pairs
from prefopt.losses import ranking as ranking
from prefopt.losses import reference_free as reference_free
from prefopt.losses import whole_batch as whole_batch
from prefopt.losses.common import LossOutput as LossOutput
from prefopt.losses.common import implied as implied
from prefopt.losses.common import logistic as logistic
from prefopt.losses.common import loss_option as loss_option
from prefopt.losses.common import pair_output as pair_output
from prefopt.losses.declare import LOSSES as LOSSES
from prefopt.losses.declare import loss as loss
