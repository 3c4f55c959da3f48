"""A training stage as a Ray Train job."""
