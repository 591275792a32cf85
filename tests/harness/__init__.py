"""Drive a candidate as vLLM does, compare with the reference, report."""
