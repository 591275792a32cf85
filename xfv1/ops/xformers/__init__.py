"""xFormers' ops: split-K, FlashAttention 3, and those over contiguous keys."""
