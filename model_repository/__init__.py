"""The Triton models of a deployment; `serve repository` copies them and derives every config.pbtxt.

flux2 itself is an ensemble: a config without code.
"""
