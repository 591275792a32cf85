"""Real weights: SmolLM2-135M-Instruct through xfv1, through CPU_ATTN and by Transformers."""
