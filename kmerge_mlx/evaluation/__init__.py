"""What ``kmerge-mlx evaluate`` measures: scores, and how far they can be trusted."""
