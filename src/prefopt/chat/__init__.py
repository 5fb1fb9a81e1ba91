"""``prefopt chat``."""
