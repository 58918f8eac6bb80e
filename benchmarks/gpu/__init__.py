"""The parts of FLUX.2 on a GPU, in every mode in which they can run, beside the card's own ceilings."""
