"""Run folders: records, metrics, callbacks, diagnosis."""
