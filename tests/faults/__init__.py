"""Faults of every kind, on the real server: what the plugin's server does, beside what stock vLLM does."""
