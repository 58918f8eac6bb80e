"""How the parts of an artifact are run: one engine protocol, a runtime behind each folder."""
