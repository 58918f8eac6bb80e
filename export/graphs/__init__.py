"""The parts of the model as torch modules written for export."""
