"""What holds for all tests: no network. Being here also puts `tests/` on the path, for `from tiny import ...`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
