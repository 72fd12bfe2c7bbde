"""``kmerge-mlx serve``: an OpenAI-compatible server over merged prompts."""
