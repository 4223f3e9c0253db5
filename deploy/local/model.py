"""The shipped graph in Triton's Python backend, for a Triton that has no ONNX Runtime backend.

Triton calls this file; it lies beside model.onnx in the rendered version folder. A request is a batch already, so each
is run alone: joining the requests of one call gained nothing for 1 to 256 rows a request, 4 to 16 requests at once.
"""
import hashlib
import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One session on one thread: the scores do not depend on the machine's core count."""

    def initialize(self, args):
        """Errors: ValueError where model.onnx is not the one that the configuration names: Triton does not load it."""
        config = json.loads(args['model_config'])
        weights = (Path(args['model_repository']) / args['model_version'] / 'model.onnx').read_bytes()
        if hashlib.sha256(weights).hexdigest() != config['parameters']['sha256']['string_value']:
            raise ValueError('model.onnx is not the one that config.pbtxt names: write the repository again')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(weights, options, providers=['CPUExecutionProvider'])
        self.inputs = [entry['name'] for entry in config['input']]

    def execute(self, requests):
        """One response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        if request.is_cancelled():      # its caller has left
            return triton.InferenceResponse(error=triton.TritonError('cancelled', triton.TritonError.CANCELLED))
        try:
            feed = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            names = list(request.requested_output_names())
            outputs = self.session.run(names, feed)
        except Exception as error:      # noqa: BLE001  (one bad request must not fail those that came with it)
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        return triton.InferenceResponse([triton.Tensor(name, output)
                                         for name, output in zip(names, outputs, strict=True)])
