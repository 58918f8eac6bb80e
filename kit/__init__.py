"""Ground floor: facts about FLUX.2 and the contracts that every other room stands on."""

__version__ = "0.1.0"
