"""Fuzzing of every parser of this package; ``python -m tests.fuzz`` runs it, ``test_targets.py`` a short form."""
