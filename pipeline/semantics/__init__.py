"""The frozen CLIP teacher, its text embeddings, and the branch that learns its soft labels."""
