"""A conversation about an image: ``session`` answers and measures, ``terminal`` is what a person sees."""
