"""The tests that every candidate must pass, one file to a kind of promise."""
