"""The ops: each says what it cannot serve, and serves the rest. `xfv1.dispatch` picks one."""
