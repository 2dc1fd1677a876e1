"""vLLM's own benchmark on one or two servers: runs (measure), table and JSON (report), plot."""
