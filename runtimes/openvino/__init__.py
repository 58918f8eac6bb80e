"""Run parts in OpenVINO."""
