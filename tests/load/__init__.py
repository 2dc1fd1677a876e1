"""Load on the CPU server with the demo pair; ``python -m tests.load`` runs it, ``test_load.py`` asserts."""
