"""Tasks with ground truth, metrics, and the benchmark that joins them."""
