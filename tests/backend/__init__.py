"""xfv1's own unit tests: what its modules answer, without an engine."""
