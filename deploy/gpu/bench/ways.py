"""The ways in which a model is run. Each is opened for a model, a device and a precision, or says why it cannot be.

    training        a step of stream.learn.fit: forward, backward, clipped, AdamW; ms and windows/s
    torch           the model as it is, for comparison
    torch.compile   the same, compiled once for every batch size
    onnxruntime     the exported graph: CUDA on a GPU, else the CPU
    tensorrt        the exported graph through ONNX Runtime's TensorRT provider

Precision: fp32, without TF32, since served scores are compared at 1e-5; mixed, which is bfloat16 by torch's autocast
(float16 where a card has no bfloat16), and float16 in the graph for ONNX Runtime and TensorRT.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from models import labels
from torch import Tensor

from stream.learn.graph import outputs
from stream.learn.model import INPUT_NAMES, ShopperModel, losses

WAYS = ('training', 'torch', 'torch.compile', 'onnxruntime', 'tensorrt')
PRECISIONS = ('fp32', 'mixed')
Run = Callable[[dict[str, Tensor]], dict[str, np.ndarray]]


class NotHereError(Exception):
    """This way cannot be gone here, and why."""


def half_of(device: str) -> torch.dtype:
    """The type of mixed precision."""
    return torch.float16 if device == 'cuda' and not torch.cuda.is_bf16_supported() else torch.bfloat16


def open_way(way: str, model: ShopperModel, graph: Callable[[], Path], device: str, precision: str) -> Run:
    """What takes windows in the machine's memory and gives answers there, copies to and from a GPU included.
    `graph` gives the model as ONNX.

    Errors   NotHereError.
    """
    if way == 'training':
        return _training(model, device, precision)
    if way.startswith('torch'):
        return _torch(model, device, precision, way == 'torch.compile')
    return _onnxruntime(list(outputs(model)), graph, device, precision, way == 'tensorrt')


def _training(model: ShopperModel, device: str, precision: str) -> Run:
    model = model.to(device).train()
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device, enabled=precision == 'mixed' and half_of(device) == torch.float16)

    def step(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        placed = {name: part.to(device) for name, part in batch.items()}
        truth = [part.to(device) for part in labels(len(batch['row_id']))]
        with torch.autocast(device, half_of(device), enabled=precision == 'mixed'):
            logits = model.logits(placed['categories'], placed['numbers'], placed['counters'])
        loss = torch.stack(list(losses(logits.float(), *truth).values())).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        scaler.step(optimizer)
        scaler.update()
        return {'loss': loss.detach().cpu().numpy()}

    return step


def _torch(model: ShopperModel, device: str, precision: str, compiled: bool) -> Run:
    model = model.to(device).eval()
    function = torch.compile(model) if compiled else model

    def run(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        placed = [batch[name].to(device) for name in INPUT_NAMES]
        for part in placed if compiled else ():
            torch._dynamo.maybe_mark_dynamic(part, 0)
        with torch.inference_mode(), torch.autocast(device, half_of(device), enabled=precision == 'mixed'):
            answers = function(*placed)
        return {name: (answer.float() if answer.is_floating_point() else answer).cpu().numpy()
                for name, answer in zip(outputs(model), answers, strict=True)}

    return run


def _onnxruntime(names: list[str], graph: Callable[[], Path], device: str, precision: str, tensorrt: bool) -> Run:
    import onnxruntime

    provider = {(True, 'cuda'): 'TensorrtExecutionProvider', (False, 'cuda'): 'CUDAExecutionProvider',
                (False, 'cpu'): 'CPUExecutionProvider'}.get((tensorrt, device))
    if provider is None:
        raise NotHereError('TensorRT needs a GPU')
    if provider not in onnxruntime.get_available_providers():
        raise NotHereError(f'onnxruntime {onnxruntime.__version__} comes without {provider}: install onnxruntime-gpu')
    if device == 'cpu' and precision == 'mixed':
        raise NotHereError("ONNX Runtime's CPU kernels are not for float16")
    chosen = {'TensorrtExecutionProvider': {'trt_fp16_enable': precision == 'mixed'},
              'CUDAExecutionProvider': {'use_tf32': 0}}.get(provider, {})
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    content = graph().read_bytes()
    if precision == 'mixed' and not tensorrt:
        content = _in_float16(content)
    session = onnxruntime.InferenceSession(content, settings, providers=[(provider, chosen)])
    if session.get_providers()[0] != provider:
        raise NotHereError(f'{provider} could not be started')

    def run(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        answers = session.run(names, {name: batch[name].numpy() for name in INPUT_NAMES})
        return {name: np.asarray(answer) for name, answer in zip(names, answers, strict=True)}

    return run


def _in_float16(content: bytes) -> bytes:
    """The graph with float16 inside; its inputs and outputs stay as they are."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True).SerializeToString()
