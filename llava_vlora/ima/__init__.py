"""Implicit multimodal alignment (IMA, arXiv 2405.16700) of a language model that sees: states, scores, subnetworks.

Works on any decoder with Llama's or OPT's submodules; what is analysed is a stream of :class:`~.layout.Batch`.
"""
