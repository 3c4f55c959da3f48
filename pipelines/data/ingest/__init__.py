"""Ingest: data sets in their own file formats -> checked, deduplicated Arrow shards."""
