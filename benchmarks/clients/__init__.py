"""Other people's clients against a deployment, beside the kit's own."""
