"""The quality gate: generate the same prompts and seeds with two artifacts and check the differences."""
