"""Variants of one recipe, trained and evaluated alike: ``llava-vlora sweep``."""
