"""Tracr programs as ground truth: RASP, compiled to weights by somebody else's compiler.

A program comes from files or from its compiler (Lindner et al. 2023, arXiv 2301.05062).  Every
dimension of the residual stream has a label, so that its edges can be read off the weights.
"""
