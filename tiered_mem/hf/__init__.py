"""Adapters that put stock transformers models on the runtime."""
