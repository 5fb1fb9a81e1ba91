"""Attention kernels and the log-probability head."""
