"""Prompts: what of a text merges, and as which token ids."""
