"""A bundle on a real Triton server, the one inside nvidia-pytriton: its answers are the pipeline's.

    python tests/triton_server.py BUNDLE

To be run by an environment with nvidia-pytriton and vtp, made from Debian's or Ubuntu's own python3, whose
library the server loads; `make test-triton` makes one. That server has the Python backend only, so the front
runs the image stages itself. No GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytriton
import tritonclient.grpc as triton
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.triton.repository import write_repository

PORT = 18101
PROMPT = "what color is the star ?"
LIMIT = 120  # seconds until the server is ready


@contextmanager
def served(bundle: str) -> Any:
    """The server, with the front of the bundle's repository alone."""
    home = Path(pytriton.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_repository(open_bundle(bundle), root / "whole", engine="ort-cpu")
        shutil.copytree(root / "whole/vtp", root / "models/vtp")
        config, model = root / "models/vtp/config.pbtxt", root / "models/vtp/1/model.py"
        config.write_text(config.read_text().replace('"ensemble"', '"local"'))
        # The server looks for packages where its own python3 keeps them, not in a virtual environment.
        paths = [path for path in sys.path if path.endswith("site-packages")]
        model.write_text(f"import sys\n\nsys.path[:0] = {paths!r}\n{model.read_text()}")
        shutil.copytree(home / "tritonserver/backends", root / "backends")
        stub = f"tritonserver/python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}"
        shutil.copy(home / stub / "triton_python_backend_stub", root / "backends/python")
        command = [home / "tritonserver/bin/tritonserver", f"--model-repository={root / 'models'}"]
        command += [f"--backend-directory={root / 'backends'}", f"--grpc-port={PORT}", "--allow-http=0"]
        libraries = home.parent / "nvidia_pytriton.libs"
        surroundings = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }
        server = subprocess.Popen([*map(str, command), "--allow-metrics=0"], env=surroundings)
        try:
            yield server
        finally:
            server.terminate()
            server.wait()


def client_of(server: subprocess.Popen) -> Any:
    """A client once the model is ready."""
    client, started = triton.InferenceServerClient(f"localhost:{PORT}"), time.monotonic()
    while time.monotonic() - started < LIMIT:
        if server.poll() is not None:
            raise SystemExit(f"the server left with {server.returncode}; its words are above")
        try:
            if client.is_model_ready("vtp"):
                return client
        except triton.InferenceServerException:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server was not ready after {LIMIT} s")


def ask(client: Any, **given: tuple[np.ndarray, str]) -> dict[str, Any]:
    """One request; the arrays of the answer as lists."""
    inputs = []
    for name, (array, kind) in given.items():
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    answer = client.infer("vtp", inputs)
    return {name: answer.as_numpy(name).tolist() for name in ("TEXT", "TOKEN_IDS", "VISUAL_TOKENS", "KEPT")}


def main(bundle: str) -> int:
    """See the module's words; 1 where an answer differs."""
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (120, 90, 3), dtype=np.uint8))
    file = BytesIO()
    picture.save(file, "PNG")
    given = {
        "IMAGE": (np.frombuffer(file.getvalue(), np.uint8), "UINT8"),
        "PROMPT": (np.array([PROMPT.encode()], dtype=object), "BYTES"),
        "MAX_NEW_TOKENS": (np.array([8], np.int32), "INT32"),
    }
    with served(bundle) as server:
        client = client_of(server)
        found = ask(client, **given)
        try:
            ask(client, **given, KEEP_TOKENS=(np.array([0], np.int32), "INT32"))
            refusal = ""
        except triton.InferenceServerException as error:
            refusal = str(error)
    with Pipeline.load(bundle, engine="ort-cpu") as pipe:
        wanted = pipe.generate(picture, PROMPT, max_new_tokens=8)
    same = found["TOKEN_IDS"] == wanted.token_ids and found["KEPT"] == wanted.kept
    print(f"Triton: {found['TOKEN_IDS']}\nvtp:    {wanted.token_ids}\nrefusal: {refusal}")
    return int(not same or "keep_tokens 0 is not in this bundle" not in refusal)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
