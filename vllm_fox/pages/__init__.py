"""Allocation of pages: the cache spec, the pool, vLLM's manager and connector, and the worker's page table."""
