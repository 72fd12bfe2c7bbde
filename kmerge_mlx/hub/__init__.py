"""The Hugging Face hub: what a name means, fetching what it names, and uploading an adapter."""
