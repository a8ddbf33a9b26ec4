"""Records of a source to tar shards, and the index through which they are read."""
