"""OpenVINO as a rival, where `pip install openvino nncf` was done: the plain twin through its own converter.

8 bits come from NNCF's post-training quantisation, its preset for transformers, calibrated on the call that is timed.
"""
import importlib.util

import torch


def build(plain, inputs, precision):
    """(function of the model's inputs, None), or (None, why there is none)."""
    for package in ("openvino", *(("nncf",) if precision == "int8" else ())):
        if importlib.util.find_spec(package) is None:
            return None, f"{package} is not installed"
    try:
        call = openvino(plain, inputs, precision)
        call(*inputs)
    except Exception as error:  # whatever a converter of other versions raises; the report shows it
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return call, None


def openvino(plain, inputs, precision):
    """A function of the model's inputs that returns its output, on as many threads as torch has."""
    import openvino as ov

    model = ov.convert_model(plain, example_input=tuple(inputs))
    model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, inputs, strict=True)})
    if precision == "int8":
        import nncf

        calls = nncf.Dataset([[tensor.numpy() for tensor in inputs]])
        model = nncf.quantize(model, calls, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    request = ov.Core().compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()

    def call(*given):
        outputs = request.infer([tensor.numpy() for tensor in given], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return call
