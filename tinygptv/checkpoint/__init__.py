"""Checkpoint folders: manifests and hashes, weight files of any kind, model cards."""
