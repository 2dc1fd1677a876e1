"""Who is admitted when, and that whoever is admitted finishes."""
