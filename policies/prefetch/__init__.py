"""Predictors, one a file."""
