"""Mixed precision: which layers a recipe should spare, predicted by one backward pass and proven on images."""
