"""Read adapters (LoRA, LoKr) of all common file formats and add them to the weights of an export."""
