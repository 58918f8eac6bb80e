"""Run the parts of an artifact: one engine protocol, one folder per runtime."""
