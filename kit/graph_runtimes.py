"""The runtimes that run a graph on a CPU, by the names of command-line options; runtimes/open.py opens them."""

from __future__ import annotations

from typing import Literal, get_args

GraphRuntime = Literal["ort-cpu", "openvino-fp32", "openvino-bf16"]  # OpenVINO with the type in which it multiplies
GRAPH_RUNTIMES: tuple[GraphRuntime, ...] = get_args(GraphRuntime)
DEFAULT_RUNTIME: GraphRuntime = "ort-cpu"
