"""Published files by name: weights and data sets are downloaded, checked, and recorded in a lock file beside them."""
