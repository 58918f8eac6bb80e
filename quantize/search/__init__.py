"""Mixed precision: predict with a backward pass which layers a recipe should spare, and verify it on images."""
