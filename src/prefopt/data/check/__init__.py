"""``prefopt data check``: audit of data files."""
