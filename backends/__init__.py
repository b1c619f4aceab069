"""The backends by name; each is imported when asked for, so none needs to be installed."""

if __name__ != "effopt.backends":
    raise ImportError("import effopt.backends, not backends: two names make two modules")

TABLE = {
    "eager": "effopt.backends.eager:Eager",
    "onnx": "effopt.backends.onnx:Onnx",
    "ort": "effopt.backends.ort:Ort",
    "trt": "effopt.backends.trt:Trt",
    "trt-rtx": "effopt.backends.trt:TrtRtx",
}
