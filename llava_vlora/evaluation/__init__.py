"""Answering, scoring and measuring a model, apart from training and from the report."""
