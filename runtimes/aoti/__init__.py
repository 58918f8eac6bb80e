"""Parts compiled by AOTInductor, in torch."""
