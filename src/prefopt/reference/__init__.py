"""Reference log-probabilities: identity, cache, models in memory."""
