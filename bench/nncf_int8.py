"""ResNet-20/CIFAR-10 in 8 bits as NNCF makes it (openvinotoolkit/nncf): a contender for `bench.deploy`.

    python -m bench.nncf_int8

NNCF is no dependency of ours: it runs in a virtual environment of its own in the cache directory, made on the first
run. It is given the float32 file in plain operators and the calibration split, and quantises with its defaults: the
ONNX file (contenders/nncf_int8.onnx), and the same network as OpenVINO's IR (contenders/nncf_int8.xml and .bin).
Prints the accuracy of both on the test split, and their times as shares of that of float32 in ONNX Runtime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from examples import cache, cifar10, resnet20
from grainwise.evaluate.data import Splits
from grainwise.evaluate.deployed import first_sample, outputs_in, race
from grainwise.evaluate.evaluator import targets_of
from grainwise.evaluate.measures import resolve_metric
from grainwise.export.openvino import compiled, open_openvino
from grainwise.export.runtime import Runner, plain
from grainwise.graph.forward import default_forward
from grainwise.graph.trace import trace
from grainwise.session import EXAMPLE_SAMPLES, mark

CONTENDERS = Path("out/bench-deploy/contenders")
PACKAGES = ("nncf==3.4.0", "openvino==2026.4.1", "onnx==1.23.2", "onnxruntime==1.32.0")
INSTALL_SECONDS, QUANTISE_SECONDS = 1800, 900

QUANTISE = """
import sys
import nncf, numpy, onnx, openvino
float_file, pictures, name, out = sys.argv[1:]
with numpy.load(pictures, allow_pickle=False) as stored:
    values = stored["arr_0"]
data = nncf.Dataset([{name: value[None]} for value in values])
onnx.save(nncf.quantize(onnx.load(float_file), data, subset_size=len(values)), f"{out}/nncf_int8.onnx")
network = nncf.quantize(openvino.Core().read_model(float_file), data, subset_size=len(values))
openvino.save_model(network, f"{out}/nncf_int8.xml", compress_to_fp16=False)
"""


class Missing(RuntimeError):
    """NNCF cannot be used here; the message says why."""


def environment() -> Path:
    """The Python of NNCF's own environment, made when it is not there or was not finished. Raises Missing."""
    folder = cache.directory() / "-".join(package.replace("==", "-") for package in PACKAGES)
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        venv.create(folder, clear=True, with_pip=True)
        _ran([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], "be installed", INSTALL_SECONDS)
        finished.touch()
    return python


def _ran(command: list[str], what: str, seconds: int) -> None:
    """Runs a command of NNCF's environment; nothing of ours is on its path, and it reports to nobody."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"NNCF_CI": "1"}
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, env=settings)
    except subprocess.CalledProcessError as error:
        last = next(iter(error.stderr.strip().splitlines()[-1:]), "no message")
        raise Missing(f"NNCF cannot {what} here, no file was written: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"NNCF cannot {what} here, no file was written: {error}") from error


def reference_file() -> bytes:
    """The float32 network as ONNX in plain operators."""
    model = resnet20.pretrained()
    example = torch.randn(EXAMPLE_SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, marked = mark(model, example, default_forward, trace(model, example))
    content: bytes = plain(marked.write_reference().SerializeToString()).SerializeToString()
    return content


def contenders(float_file: bytes, splits: Splits, name: str) -> None:
    """Writes the files of NNCF. name: of the network's input. Raises Missing; no file is left half-written."""
    python = environment()
    CONTENDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONTENDERS.parent) as folder:
        given, pictures, made = Path(folder) / "float.onnx", Path(folder) / "pictures.npz", Path(folder) / "made"
        made.mkdir()
        given.write_bytes(float_file)
        np.savez(pictures, torch.cat([batch.inputs for batch in splits.calibration]).numpy())
        _ran([str(python), "-c", QUANTISE, str(given), str(pictures), name, str(made)], "quantise", QUANTISE_SECONDS)
        for file in made.iterdir():
            file.replace(CONTENDERS / file.name)


def default_session(content: bytes) -> Runner:
    """ONNX Runtime as it comes, at one thread: NNCF leaves biases in float32, and with the optimiser that grainwise
    switches off (`export.runtime.DISABLED`) ONNX Runtime would not fuse a single convolution of such a file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Runner = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session


def main() -> None:
    torch.set_num_threads(1)
    splits, names, accuracy = Splits.read(cifar10.splits()), ["input"], resolve_metric("accuracy")
    float_file = reference_file()
    try:
        contenders(float_file, splits, names[0])
    except Missing as error:
        sys.exit(str(error))
    content = (CONTENDERS / "nncf_int8.onnx").read_bytes()
    sessions = {
        "float32, ONNX Runtime": default_session(float_file),
        "nncf_int8.onnx, ONNX Runtime": default_session(content),
        "nncf_int8.onnx, OpenVINO": open_openvino(content),
        "nncf_int8.xml, OpenVINO": compiled(CONTENDERS / "nncf_int8.xml", names),
    }
    found = race(sessions, first_sample(splits.test[0].inputs, names))
    targets = targets_of(splits.test)
    rows = {
        label: {
            "accuracy": accuracy(torch.from_numpy(outputs_in(session, splits.test, names)), targets),
            "latency_ratio": round(found.ratios[label], 3),
        }
        for label, session in sessions.items()
    }
    print(json.dumps({"size_bytes": len(content), "noise": round(found.spread, 3), **rows}, indent=1))


if __name__ == "__main__":
    main()
