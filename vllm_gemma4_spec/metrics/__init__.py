"""What a server shows at ``/metrics`` beside vLLM's own: processes, patches, dropped drafts, repaired scales."""
