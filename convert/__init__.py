"""PyTorch checkpoints to MLX adapter folders, and back (installed as ``kmerge_mlx.convert``)."""
