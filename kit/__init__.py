"""Facts about FLUX.2 and the data formats shared by all other packages."""

__version__ = "0.1.0"
