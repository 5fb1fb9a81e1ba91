"""Exports of a finished model for servers, and the check that what was written computes what was trained."""
