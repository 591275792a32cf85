"""Programs that are run by hand, on a GPU or for longer than a test may take."""
