"""Generation from merged prompts, through mlx-lm."""
