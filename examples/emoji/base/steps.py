"""What both trainings share: mixed precision, the optimizer, and a training step as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from base.timing import Clock


def mixed_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def adamw(parameters: list[nn.Parameter], device: torch.device, **options: object) -> torch.optim.AdamW:
    """AdamW; on a GPU its learning rate is a tensor there, so that a captured step can follow a schedule."""
    cuda = device.type == "cuda"
    rate = torch.zeros((), device=device) if cuda else 0.0
    return torch.optim.AdamW(parameters, lr=rate, fused=cuda, capturable=cuda, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def apply_gradients(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def captured(update: Callable[[], None], device: torch.device, clock: Clock) -> tuple[Callable[[], object], str]:
    """The update as one CUDA graph, and "captured": thousands of small kernels then start with a single call.

    `update` has to read its batch from tensors that stay in place, to draw no random numbers, and never to look at a
    value on the host. Where capturing fails, and on a CPU, the update itself is returned, and "eager".
    """
    if device.type != "cuda":
        return update, "eager"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # allocations, optimizer state and kernel choices have to be made before
            update()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            update()
    except Exception as error:
        clock.log("not captured as a CUDA graph:", repr(error)[:300])
        torch.cuda.synchronize()
        return update, "eager"
    return graph.replay, "captured"
