"""How vLLM is changed: patches as data, one engine that applies and undoes them, one ledger that lists them."""
