"""Settings of the whole test run."""

import os

# Threads split a product's sums differently in different kernels, so tokens and logits compare
# bit by bit on one thread only; and small products on two threads crawl beside a busy core.
os.environ["OMP_NUM_THREADS"] = "1"
