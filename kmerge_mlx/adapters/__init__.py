"""Adapter folders: their schema, their files, and LoRA."""
