"""Recurrent layers over packed rows: convolutions and states fork where responses leave their prompt."""
