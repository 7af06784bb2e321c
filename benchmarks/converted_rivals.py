"""Other engines as rivals, where they are installed: the plain twin through their own converters.

openvino     `pip install openvino nncf`; 8 bits by NNCF's quantisation, its preset for transformers, calibrated on the
             call that is timed
onnxruntime  `pip install onnxruntime onnx onnxscript`; 8 bits by its dynamic quantisation, which its documentation
             names for transformers: weights per output channel, one scale of the call for each product's input
"""
import importlib.util
import pathlib
import tempfile

import torch

from difuse_kernels.linear.linear import layout


def build(name, plain, inputs, precision):
    """(function of the model's inputs, None), or (None, why there is none)."""
    if (name, precision) == ("onnxruntime", "bf16"):
        return None, "its CPU kernels have no bfloat16"
    for package in (*_PACKAGES[name], *(("nncf",) if (name, precision) == ("openvino", "int8") else ())):
        if importlib.util.find_spec(package) is None:
            return None, f"{package} is not installed"
    try:
        call = RIVALS[name](plain, inputs, precision)
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


def onnxruntime(plain, inputs, precision):
    """The same by ONNX Runtime."""
    import onnxruntime as ort

    names = [f"input{i}" for i in range(len(inputs))]
    with tempfile.TemporaryDirectory(prefix="difuse-onnx-") as folder:
        path = pathlib.Path(folder) / "model.onnx"
        torch.onnx.export(plain, tuple(inputs), path, input_names=names, verbose=False)  # weights in a file beside it
        if precision == "int8":
            import onnx
            from onnxruntime.quantization import quantize_dynamic

            exported, source, path = onnx.load(path), path.with_name("source.onnx"), path.with_name("int8.onnx")
            del exported.graph.value_info[:]  # shapes that its quantiser, having transposed weights, finds wrong
            onnx.save(exported, source, save_as_external_data=True, location="source.data")
            quantize_dynamic(source, path, per_channel=True, use_external_data_format=True,
                             reduce_range=layout()[2] < 127)  # as its documentation has it for such CPUs
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*given):
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
        return torch.from_numpy(outputs[0])

    return call


RIVALS = {"openvino": openvino, "onnxruntime": onnxruntime}
_PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
