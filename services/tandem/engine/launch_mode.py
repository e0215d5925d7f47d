"""The autograd mode of a launch. Plans compute under inference mode, gradient launches under autograd; nothing is left
behind, so that one thread runs both in any order."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch

from tandem.engine.device import GradientsResolved, GradientWork


def inference_launch() -> AbstractContextManager[object]:
    """The mode of a plan: no graph, no version counters; its tensors can never be part of a graph later."""
    return torch.inference_mode()


def run_with_gradients(work: GradientWork, device: torch.device) -> GradientsResolved:
    """Run a gradient launch to its end, on a GPU too. What it raises becomes its result: it is nobody else's fault."""
    began = time.perf_counter()
    value: object = None
    error: Exception | None = None
    with torch.inference_mode(False), torch.enable_grad():
        try:
            value = work.run()
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        except Exception as raised:
            error = raised
    return GradientsResolved(value, error, time.perf_counter() - began)
