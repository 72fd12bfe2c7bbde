"""Pictures (matplotlib: ``pip install 'kmerge-mlx[plot]'``), one module each."""
