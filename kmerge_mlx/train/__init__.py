"""Training: settings, data, loss, the loop, and the folder that a run leaves."""
