"""Training data: Arrow shards, cached query features, batches."""
