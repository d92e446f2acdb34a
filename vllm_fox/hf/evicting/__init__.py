"""Decoders that evict tokens (DMS, KVzap) for transformers."""
