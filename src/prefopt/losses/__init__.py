"""Losses. Importing any of them declares all of them, so that ``LOSSES`` is whole."""

from prefopt.losses import batch as batch
from prefopt.losses import difference as difference
from prefopt.losses import preference as preference
from prefopt.losses import ranking as ranking
from prefopt.losses import reference_free as reference_free
from prefopt.losses import separate as separate
from prefopt.losses import terms as terms
from prefopt.losses import unpaired as unpaired
