"""``kmerge-mlx serve``: mlx-lm's OpenAI-compatible server over merged prompts."""
