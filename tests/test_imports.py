"""What `import veneer` loads, and how long it takes."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys, time
import torch
start = time.process_time()  # other programs on the machine do not count
import veneer
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "loaded": [m for m in sys.modules if "." not in m]}))
"""


def import_veneer():
    return json.loads(
        subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    )


def test_import_is_light():
    loaded = import_veneer()["loaded"]
    assert {"transformers", "bitsandbytes", "peft"}.isdisjoint(loaded)


def test_import_is_quick():
    assert min(import_veneer()["seconds"] for _ in range(3)) < 0.5
