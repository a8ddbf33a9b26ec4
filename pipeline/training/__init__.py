"""DeepSpeed engine, checkpoints and the training loop."""
