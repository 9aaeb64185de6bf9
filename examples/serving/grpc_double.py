"""Serves an export to several clients at once over gRPC, through the official PredictionService protos.

    python -m examples.serving.grpc_double [--clients 8]

The server here is a TEST DOUBLE of TensorFlow Serving: it answers `Predict` with the messages of the package
`tensorflow-serving-api` and runs the export in a TensorFlow session with the same warm-up, in about a hundred lines
of Python. Clients written for it talk to `tensorflow_model_server` unchanged.
"""

import argparse
import pathlib
import tempfile
import threading
import time
from concurrent import futures

import numpy as np

TOLERANCE = 1e-5


class TestDouble:
    """`PredictionService` over one loaded export.

    Args:
        name: str, name of the model.
        folder: `pathlib.Path` of the exported version.
    """

    def __init__(self, name, folder):
        import tensorflow as tf

        self.name, self.version = name, int(folder.name)
        self.session = tf.compat.v1.Session(graph=tf.Graph())
        with self.session.graph.as_default():
            loaded = tf.compat.v1.saved_model.load(self.session, ["serve"], str(folder))
        self.signatures = dict(loaded.signature_def)
        self._warm_up(folder / "assets.extra" / "tf_serving_warmup_requests")

    def _warm_up(self, path):
        import tensorflow as tf
        from tensorflow_serving.apis import prediction_log_pb2

        if path.exists():
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                self._predict(prediction_log_pb2.PredictionLog.FromString(record).predict_log.request)

    def _predict(self, request):
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        key = request.model_spec.signature_name or "serving_default"
        if key not in self.signatures:
            raise tf.errors.InvalidArgumentError(
                None, None, f"Unknown signature {key!r}. Available: {sorted(self.signatures)}"
            )
        signature = self.signatures[key]
        if set(request.inputs) != set(signature.inputs):
            raise tf.errors.InvalidArgumentError(
                None, None, f"{key!r} takes the inputs {sorted(signature.inputs)}. Received: {sorted(request.inputs)}"
            )
        feed = {signature.inputs[name].name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        outputs = {name: info.name for name, info in signature.outputs.items()}
        response = predict_pb2.PredictResponse()
        response.model_spec.name, response.model_spec.signature_name = self.name, key
        response.model_spec.version.value = self.version
        for name, value in self.session.run(outputs, feed).items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response

    def predict(self, request, context):
        """The `Predict` call of the service."""
        import grpc
        import tensorflow as tf

        if request.model_spec.name != self.name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {request.model_spec.name}")
        try:
            return self._predict(request)
        except tf.errors.OpError as error:  # both libraries use the same codes
            code = next(code for code in grpc.StatusCode if code.value[0] == error.error_code)
            context.abort(code, error.message)
        except (TypeError, ValueError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def start(double, workers):
    """A gRPC server on a free local port: `(server, address)`."""
    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            return double.predict(request, context)

    server = grpc.server(futures.ThreadPoolExecutor(workers))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    return server, f"localhost:{port}"


class Client:
    """Calls signatures by name, of the server or of its double.

    Args:
        address: `host:port` of the server's gRPC service.
        model: name of the model.
    """

    # dtypes of inputs given as Python numbers and lists; int32 for others
    DTYPES = {"sessions": "int64", "temperature": "float32"}

    def __init__(self, address, model):
        import grpc
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.model, self.channel = model, grpc.insecure_channel(address)
        self.service = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)

    def __call__(self, signature, **inputs):
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = self.model, signature
        for name, value in inputs.items():
            dtype = None if isinstance(value, np.ndarray) else self.DTYPES.get(name, "int32")
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value, dtype))
        response = self.service.Predict(request, timeout=120)
        return {name: tf.make_ndarray(value) for name, value in response.outputs.items()}


def converse(client, seed, vocabulary):
    """One client with its own session: sends chunks of random lengths, generates; returns its tokens and logits."""
    rng = np.random.default_rng(seed)
    (session,) = client("open", count=1)["sessions"]
    read, told = [], []
    for turn in range(6):
        chunk = rng.integers(0, vocabulary, (1, rng.integers(1, 12))).astype("int32")
        results = client("append", sessions=[session], token_ids=chunk, lengths=[chunk.shape[1]])
        told.append((sum(map(len, read)), results["logits"][0]))
        read.append(chunk[0])
        results = client(
            "session_generate",
            sessions=[session],
            token_ids=[[0]],
            lengths=[0],
            max_new_tokens=4,
            temperature=0.0 if turn % 2 else 0.9,
            top_k=0,
            seed=[seed],
            stop_tokens=[-1],
        )
        read.append(results["tokens"][0])
        assert results["positions"][0] == sum(map(len, read))
    client("close", sessions=[session])
    return np.concatenate(read), told


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args(argv)
    import grpc

    import keras_fam
    from examples.serving.small_model import VOCABULARY, small_model
    from keras_fam.export import export_serving

    lm, found = small_model(), {}
    with tempfile.TemporaryDirectory() as folder:
        double = TestDouble("fam", export_serving(lm, pathlib.Path(folder) / "fam", sessions=arguments.clients))
        server, address = start(double, workers=arguments.clients)
        print(f"test double of TensorFlow Serving on {address}: signatures {sorted(double.signatures)}")

        def work(seed):
            found[seed] = converse(Client(address, "fam"), seed, VOCABULARY)

        begun = time.perf_counter()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(arguments.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        if len(found) != arguments.clients:
            raise SystemExit("A client failed.")
        client = Client(address, "fam")
        try:
            client("append", sessions=[0], token_ids=[[1]], lengths=[1])
            raise SystemExit("A closed session accepted a call.")
        except grpc.RpcError as error:
            print(f"a closed session: {error.code().name}: {error.details().splitlines()[-2].strip()}")
        client.channel.close()
        server.stop(None).wait()
    stream, difference = keras_fam.StreamingModel(lm, 1), 0.0
    for read, told in found.values():
        stream.reset_state()
        expected = stream.predict(read[None])[0]
        for first, logits in told:
            difference = max(difference, float(np.abs(expected[first : first + len(logits)] - logits).max()))
    tokens = sum(len(read) for read, _ in found.values())
    print(
        f"{arguments.clients} clients, a session each, {12 * arguments.clients} calls, {tokens} tokens in "
        f"{seconds:.1f} s; largest difference from private streams {difference:.1e}"
    )
    if not difference <= TOLERANCE:
        raise SystemExit(f"The difference exceeds {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
