"""The quality gate: the same prompts and seeds drawn with two artifacts, measured, and held to a contract."""
