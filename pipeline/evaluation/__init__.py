"""Checkpoint to detections to federated AP."""
