"""The reference, verified first."""
