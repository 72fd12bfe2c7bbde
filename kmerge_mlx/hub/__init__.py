"""Files of Hugging Face hub repos."""
