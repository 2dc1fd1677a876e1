"""Tools around a server: what is wrong (doctor), what fits and how fast (plan), how fast it is (bench)."""
