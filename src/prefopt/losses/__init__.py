"""Losses. Importing any of them declares all of them, so that ``LOSSES`` is whole."""

from prefopt.losses import preference as preference
from prefopt.losses import reference_free as reference_free
