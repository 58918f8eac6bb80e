"""Record the input statistics of every linear layer while a checkpoint runs over prompts."""
