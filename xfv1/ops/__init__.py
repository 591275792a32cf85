"""The ops, one module each: why not, and how. `xfv1.dispatch` picks among them."""
