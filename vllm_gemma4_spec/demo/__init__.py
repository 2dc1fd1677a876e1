"""A small trained target and drafter in Gemma 4's shape, and the demo that serves them."""
