"""Paged attention in Triton: `launch` on the host, `device` on the GPU, `tiling` between them.

Only `tiling` can be imported where Triton is not installed.
"""
