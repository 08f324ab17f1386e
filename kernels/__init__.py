"""Attention over LongGen patterns: definition, fp32 reference, CPU and GPU paths.

Kept free of heavy imports and of a version attribute: this folder shadows the PyPI package of the
same name, which transformers probes for.
"""
