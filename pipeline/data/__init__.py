"""Raw data sets to shards, shards to a planned stream of batches."""
