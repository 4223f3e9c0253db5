"""A Triton stub: the gRPC protocol and the checks of the real one, around any answer, and faults on command.

It stands in for the real server in the contract suite; where it differs from it, that suite fails.
"""
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from stream.core.features import COUNTERS, SLOT_NUMBERS, Batch
from stream.core.scores import OUTPUT_NAMES, Outputs

Request = service_pb2.ModelInferRequest
Response = service_pb2.ModelInferResponse
Answer = Callable[[Batch], Outputs]
Fault = Callable[[Response, grpc.ServicerContext], Response | None]     # None: the answer as it is now

INPUTS = {'categories': ('INT32', [-1, -1, 3]), 'numbers': ('FP32', [-1, -1, SLOT_NUMBERS]),
          'counters': ('FP32', [-1, COUNTERS]), 'row_id': ('INT64', [-1, 1])}
DTYPES = {'INT32': np.int32, 'INT64': np.int64, 'FP32': np.float32}


class StubTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves `answer` on a free port of 127.0.0.1 until `stop`.

    faults   each is used by one request and gone; when they are used up, `always` is
    ready    what it says of its model
    gate     requests wait here: clear it to hold them
    """

    def __init__(self, answer: Answer, tiers: int = 5, name: str = 'shopper', version: str = '1') -> None:
        self.answer = answer
        self.name, self.version = name, version
        self.inputs = {key: (kind, list(shape)) for key, (kind, shape) in INPUTS.items()}
        self.outputs = {key: ('INT64' if key == 'row_id_out' else 'FP32', [-1, tiers if key.startswith('tier') else 1])
                        for key in OUTPUT_NAMES}
        self.max_batch_size = 256
        self.parameters: dict[str, str] = {}
        self.ready = True
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.probes = 0
        self.cancelled = 0
        self.at_once = self.at_once_most = 0
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f'127.0.0.1:{self.port}'

    def start(self) -> None:
        """Serve on the first free port, or on the one that it had."""
        server = grpc.server(futures.ThreadPoolExecutor(32), options=[
            ('grpc.max_receive_message_length', -1), ('grpc.max_send_message_length', -1), ('grpc.so_reuseport', 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        self.port = server.add_insecure_port(f'127.0.0.1:{self.port}')
        server.start()
        self._server = server

    def stop(self) -> None:
        """Cut all calls and the port, as a killed process does."""
        if self._server:
            self._server.stop(grace=None).wait()
            self._server = None
            self.gate.set()

    def ServerLive(self, request, context):     # noqa: N802 (names of the protocol)
        self.probes += 1
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):    # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request, context):     # noqa: N802
        ready = self.ready and (request.name, request.version) == (self.name, self.version)
        return service_pb2.ModelReadyResponse(ready=ready)

    def ModelMetadata(self, request, context):  # noqa: N802
        def tensors(described: dict[str, tuple[str, list[int]]]) -> list:
            return [service_pb2.ModelMetadataResponse.TensorMetadata(name=key, datatype=kind, shape=shape)
                    for key, (kind, shape) in described.items()]
        self._known(request.name, request.version, context)
        return service_pb2.ModelMetadataResponse(
            name=self.name, versions=[self.version], inputs=tensors(self.inputs), outputs=tensors(self.outputs))

    def ModelConfig(self, request, context):    # noqa: N802
        self._known(request.name, request.version, context)
        parameters = {key: model_config_pb2.ModelParameter(string_value=value)
                      for key, value in self.parameters.items()}
        return service_pb2.ModelConfigResponse(config=model_config_pb2.ModelConfig(
            name=self.name, max_batch_size=self.max_batch_size, parameters=parameters))

    def ModelInfer(self, request, context):     # noqa: N802
        with self._lock:
            self.asked += 1
            self.at_once += 1
            self.at_once_most = max(self.at_once, self.at_once_most)
            fault = self.faults.popleft() if self.faults else self.always
        if not context.add_callback(self._ended):
            self._ended()
        self.gate.wait()
        if not context.is_active():
            with self._lock:
                self.cancelled += 1
        self._known(request.model_name, request.model_version, context)
        response = self._response(self.answer(self._batch(request, context)))
        return (fault(response, context) if fault else None) or response

    def _ended(self) -> None:
        with self._lock:
            self.at_once -= 1

    def _known(self, name: str, version: str, context: grpc.ServicerContext) -> None:
        if name != self.name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version not in ('', self.version) or not self.ready:
            context.abort(grpc.StatusCode.UNAVAILABLE,
                          f"Request for unknown model: '{name}' version {version} is not at ready state")

    def _batch(self, request: Request, context: grpc.ServicerContext) -> Batch:
        parts = {}
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
            kind, wanted = self.inputs[tensor.name]
            fits = len(wanted) == len(tensor.shape) and all(
                want in (-1, got) for want, got in zip(wanted, tensor.shape, strict=True))
            if tensor.datatype != kind or not fits or tensor.shape[0] > self.max_batch_size:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT,
                              f"unexpected shape for input '{tensor.name}' for model '{self.name}'. Expected {wanted}, "
                              f'got {list(tensor.shape)}')
            parts[tensor.name] = np.frombuffer(content, DTYPES[kind]).reshape(tensor.shape)
        return Batch(**parts)

    def _response(self, outputs: Outputs) -> Response:
        response = Response(model_name=self.name, model_version=self.version)
        for name, (kind, _) in self.outputs.items():
            add(response, name, kind, getattr(outputs, name))
        return response


def add(response: Response, name: str, kind: str, values: np.ndarray) -> None:
    response.outputs.add(name=name, datatype=kind, shape=values.shape)
    response.raw_output_contents.append(values.tobytes())


def of(response: Response, name: str) -> tuple[int, np.ndarray]:
    """A tensor of a response, to be changed and put back."""
    for index, output in enumerate(response.outputs):
        if output.name == name:
            return index, np.frombuffer(response.raw_output_contents[index], DTYPES[output.datatype]).reshape(
                output.shape).copy()
    raise KeyError(name)


def status(code: grpc.StatusCode) -> Fault:
    """Fails with this status."""
    def fault(response: Response, context: grpc.ServicerContext) -> None:
        context.abort(code, 'on command')
    return fault


def put(name: str, value: float, row: int = 0) -> Fault:
    """One number of one row is another."""
    def fault(response: Response, context: grpc.ServicerContext) -> None:
        index, values = of(response, name)
        values[row, 0] = value
        response.raw_output_contents[index] = values.tobytes()
    return fault


def wrong_shape(response: Response, context: grpc.ServicerContext) -> None:
    """One more column, in both the shape and the bytes."""
    index, values = of(response, 'churn')
    values = np.repeat(values, 2, axis=1)
    response.outputs[index].shape[:] = values.shape
    response.raw_output_contents[index] = values.tobytes()


def transposed(response: Response, context: grpc.ServicerContext) -> None:
    """As many bytes, another shape."""
    index, values = of(response, 'churn')
    response.outputs[index].shape[:] = values.shape[::-1]


def cut_bytes(response: Response, context: grpc.ServicerContext) -> None:
    """The shape is right, the bytes end early."""
    response.raw_output_contents[0] = response.raw_output_contents[0][:-4]


def wrong_type(response: Response, context: grpc.ServicerContext) -> None:
    """Doubles for floats."""
    index, values = of(response, 'churn')
    response.outputs[index].datatype = 'FP64'
    response.raw_output_contents[index] = values.astype(np.float64).tobytes()


def same_size_type(response: Response, context: grpc.ServicerContext) -> None:
    """Integers of the same size as the floats."""
    index, _ = of(response, 'churn')
    response.outputs[index].datatype = 'INT32'


def wrong_name(response: Response, context: grpc.ServicerContext) -> None:
    index, _ = of(response, 'churn')
    response.outputs[index].name = 'chum'


def missing_output(response: Response, context: grpc.ServicerContext) -> None:
    index, _ = of(response, 'churn')
    del response.outputs[index], response.raw_output_contents[index]


def repeated_output(response: Response, context: grpc.ServicerContext) -> None:
    _, values = of(response, 'churn')
    add(response, 'churn', 'FP32', values)


def no_contents(response: Response, context: grpc.ServicerContext) -> None:
    del response.raw_output_contents[:]


def short_batch(response: Response, context: grpc.ServicerContext) -> None:
    """The last row is missing, everywhere."""
    for index, output in enumerate(response.outputs):
        _, values = of(response, output.name)
        output.shape[0] -= 1
        response.raw_output_contents[index] = values[:-1].tobytes()


def permuted(response: Response, context: grpc.ServicerContext) -> None:
    """All rows in another order, with their ids."""
    for index, output in enumerate(response.outputs):
        _, values = of(response, output.name)
        response.raw_output_contents[index] = np.roll(values, 1, axis=0).tobytes()


def other_rows(response: Response, context: grpc.ServicerContext) -> None:
    """Somebody else's answer: the ids are those of other rows."""
    index, values = of(response, 'row_id_out')
    response.raw_output_contents[index] = (values + 1000).tobytes()


def other_version(response: Response, context: grpc.ServicerContext) -> None:
    response.model_version = '2'


def other_model(response: Response, context: grpc.ServicerContext) -> None:
    response.model_name = 'copy'
