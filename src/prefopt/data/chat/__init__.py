"""Conversations to token ids: chat templates, answer spans, truncation."""
