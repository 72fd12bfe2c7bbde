"""PyTorch checkpoints to MLX adapter folders (installed as ``kmerge_mlx.convert``)."""
