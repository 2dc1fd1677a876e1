"""Tests that need CUDA: ``make test-gpu`` on one card, ``make test-gpus`` on several.

A part is a file here and a process of its own; ``python -m tests.gpu`` runs the parts side by side and writes what
they found to ``benchmarks/results``. With ``--rehearse`` the same tests run on a CPU with small head sizes, as far as
they can, which shows that the tests are right and nothing about a GPU.
"""
