"""The parts as torch modules written for export."""
