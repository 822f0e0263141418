"""Pluggable policies: what stays (`eviction`) and what comes next (`prefetch`)."""
