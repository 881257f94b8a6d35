"""Forward and backward of one micro batch: launched kernel by kernel, or on a GPU replayed as a CUDA graph.

Not here: what a step makes of the gradients (`loop.train_step`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from gdn.data.loader import Batch
from gdn.model.layers import Linear
from gdn.model.lm import Block, GatedDeltaNetLM, is_watched
from gdn.ops.backend import choose_backend


def serves(model: GatedDeltaNetLM) -> bool:
    """Whether micro batches of this model can be captured: on one GPU, not sharded, every block one operator.

    What other blocks launch may ask the host for sizes, and FSDP gathers weights from hooks.
    """
    config, weight = model.config, model.lm_head.weight
    if not weight.is_cuda or isinstance(model, FSDPModule) or not (config.use_gate and config.use_short_conv):
        return False
    dtype = model.compute_dtype or weight.dtype
    return choose_backend("auto", weight.device, dtype, config.head_dim, config.head_v_dim) == "triton"


def is_plain(model: GatedDeltaNetLM) -> bool:
    """Whether every module is as it was built: no adapters, and no hooks, which a graph would not call."""
    backbone = model.model
    around = (model, backbone, backbone.embeddings, *backbone.layers, backbone.norm, model.lm_head)
    if type(model.lm_head) is not Linear or any(is_watched(module) for module in around):
        return False
    return all(layer.is_plain() for layer in backbone.layers if isinstance(layer, Block))


class MicroBatch:
    """Adds the gradients of a micro batch's summed loss, divided by the step's valid tokens, to the parameters' `.grad`.

    Where `serves` says so, what one step launches is captured in the next and replayed from then on: the host launches one
    graph instead of a thousand kernels, for the same bits. There are two: that of a step's first micro batch writes gradients,
    as autograd does where `.grad` is None, and that of the others adds to them; no pass zeroes them. Both share a pool of
    memory, where gradients keep their places while `.grad` is None, until the next first micro batch writes over them.

    Weights may change in place; where they are moved, or a batch has other shapes, it begins anew. A micro batch is launched
    while `is_plain` finds a hook on a module or an adapter. Hooks on single tensors are not replayed.
    """

    def __init__(self, model: GatedDeltaNetLM, cuda_graph: bool) -> None:
        self.model = model
        self._device = model.lm_head.weight.device
        self._stream = torch.cuda.Stream(self._device) if cuda_graph and serves(model) else None
        self._places: tuple[object, ...] = ()  # of the weights, and the shapes of the batch, that what follows is for
        self._inputs: list[Tensor | None] = []  # what the graphs read: a batch and the number of valid tokens
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and the loss, by whether gradients are added
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Batch, valid: Tensor) -> Tensor:
        """`valid`: int64 scalar on the model's device. Returns the loss divided by it, which the next call may write over."""
        inputs = [batch.input_ids, batch.labels, batch.cu_seqlens]
        if self._stream is None:
            return self._run([_to(x, self._device) for x in inputs], valid)
        if not is_plain(self.model):
            return self._launch(self._stream, inputs, valid)
        parameters = list(self.model.parameters())
        places = (*(p.data_ptr() for p in parameters), *(None if x is None else x.shape for x in inputs))
        if places != self._places:
            self._places, self._inputs, self._graphs, self._gradients = places, [], {}, []
            return self._launch(self._stream, inputs, valid)
        adding = parameters[0].grad is not None
        if adding and not (self._gradients and parameters[0].grad is self._gradients[0]):
            return self._launch(self._stream, inputs, valid)  # the step began so
        now = (*inputs, valid)
        if not self._inputs:
            self._inputs = [None if x is None else torch.empty_like(x, device=self._device) for x in now]
        for place, x in zip(self._inputs, now):
            if place is not None and x is not None:
                place.copy_(_pinned(x, self._device), non_blocking=True)
        if adding not in self._graphs:
            self._capture(self._stream, adding)
        graph, loss = self._graphs[adding]
        graph.replay()
        for parameter, gradient in zip(parameters, self._gradients):
            parameter.grad = gradient
        return loss

    def _run(self, inputs: Sequence[Tensor | None], valid: Tensor) -> Tensor:
        input_ids, labels, cu_seqlens = inputs
        out = self.model(input_ids, labels, cu_seqlens=cu_seqlens)
        loss: Tensor = out.loss_sum / valid
        loss.backward()
        return loss.detach()

    def _launch(self, stream: torch.cuda.Stream, inputs: Sequence[Tensor | None], valid: Tensor) -> Tensor:
        """On the stream of the captures, for which it compiles kernels and opens libraries: they must find all that there."""
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = self._run([_to(x, self._device) for x in inputs], valid)
        current.wait_stream(stream)
        return loss

    def _capture(self, stream: torch.cuda.Stream, adding: bool) -> None:
        """Before a capture, torch gives back what launched micro batches have left in its allocator."""
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        graph, (*inputs, valid) = torch.cuda.CUDAGraph(), self._inputs
        assert valid is not None
        # Thread-local: the thread that writes a checkpoint may ask the driver for something meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            loss = self._run(inputs, valid)
        self._graphs[adding] = graph, loss
        if not adding:
            self._gradients = [parameter.grad for parameter in self.model.parameters()]


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """From pageable memory, a copy to a GPU would wait for all that is queued there."""
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
