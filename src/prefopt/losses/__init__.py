"""Losses. Importing any of them declares all of them, so that ``LOSSES`` is whole."""

from prefopt.losses import anchored as anchored
from prefopt.losses import labels as labels
from prefopt.losses import pairs as pairs
from prefopt.losses import ranking as ranking
from prefopt.losses import reference_free as reference_free
from prefopt.losses import variants as variants
from prefopt.losses import whole_batch as whole_batch
