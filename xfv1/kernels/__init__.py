"""The Triton kernels of the backend."""
