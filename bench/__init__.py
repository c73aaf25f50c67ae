"""Speed and memory beside the baseline."""
