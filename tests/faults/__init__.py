"""Faults of every kind, on the real server: what the overlay's server does, beside what stock vLLM does."""
