"""Gemma 4's ``config.json`` as the releases of transformers write it, and the one form that is read here."""
