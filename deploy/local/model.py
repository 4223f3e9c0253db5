"""The exported graph in Triton's Python backend, for a Triton without the ONNX Runtime backend.

Triton loads this file, which is beside model.onnx in the version's folder. Each request is already a batch and is run
alone. Joining the requests of one call was not faster (1 to 256 rows per request, 4 to 16 requests at once).
"""
import hashlib
import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One session with one thread, so that the scores do not depend on the machine's core count."""

    def initialize(self, args):
        """Errors: ValueError if model.onnx is not the one named in the configuration. Triton then does not load it."""
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
        if request.is_cancelled():      # its caller has gone
            return triton.InferenceResponse(error=triton.TritonError('cancelled', triton.TritonError.CANCELLED))
        try:
            feed = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            names = list(request.requested_output_names())
            outputs = self.session.run(names, feed)
        except Exception as error:      # noqa: BLE001  (one bad request must not fail the others of the call)
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        return triton.InferenceResponse([triton.Tensor(name, output)
                                         for name, output in zip(names, outputs, strict=True)])
