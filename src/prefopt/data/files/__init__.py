"""Kinds of data files, read row by row and written."""
