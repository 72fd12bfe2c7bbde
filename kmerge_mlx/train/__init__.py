"""Training: the rows of a batch, the loss on its answers, the optimizer step."""
