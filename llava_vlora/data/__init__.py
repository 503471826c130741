"""Checks of training data in LLaVA's format; knows neither LLaVA nor torch."""
