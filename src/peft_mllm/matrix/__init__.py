"""The capability matrix: what every method does on every family, found by trying it on tiny members."""
