"""MLServer: a custom runtime, two parallel workers, adaptive batching.

It speaks the Open Inference Protocol alone, so the picture comes as base64 in a BYTES tensor of a
JSON body. MLSERVER_DEBUG=false, in the table of servers, turns the access log off.

https://docs.seldon.ai/mlserver/user-guide/custom
https://docs.seldon.ai/mlserver/user-guide/adaptive-batching
https://docs.seldon.ai/mlserver/user-guide/parallel-inference
"""

from classifier import Classifier
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Runtime(MLModel):
    """Decodes and runs a batch at once."""

    async def load(self) -> bool:
        """Load the network, once a worker."""
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run the network over a batch."""
        probabilities = self.classifier.predict(Base64Codec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("probabilities", probabilities)
        return InferenceResponse(model_name=self.name, outputs=[output])
