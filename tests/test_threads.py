import json
import subprocess
import sys

READ = """
import json, numpy, scipy.linalg, torch
from threadpoolctl import threadpool_info
from grainwise.threads import limit_threads
before = {one["prefix"]: one["num_threads"] for one in threadpool_info()}
limit_threads(1)
after = {one["filepath"]: one["num_threads"] for one in threadpool_info()}
print(json.dumps({"before": before, "after": after, "torch": torch.get_num_threads()}))
"""


def test_a_limit_holds_for_torch_and_for_the_linear_algebra_of_numpy_and_scipy() -> None:
    environment = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert "libscipy_openblas" in found["before"]  # else there is nothing to limit
    assert set(found["before"].values()) == {2}
    assert set(found["after"].values()) == {1} and found["torch"] == 1
