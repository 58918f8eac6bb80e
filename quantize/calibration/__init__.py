"""What every linear layer sees while a checkpoint runs over prompts."""
