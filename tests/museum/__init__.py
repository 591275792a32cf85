"""Faults that attention backends really had, planted one by one in a correct one."""
