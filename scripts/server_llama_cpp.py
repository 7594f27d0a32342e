"""What llama.cpp does with an adapter's folder, converted by its own converter: run by `check_servers.py`, a case a process.

    python scripts/server_llama_cpp.py CONVERTERS BASE CASE [ADAPTER.gguf]

CONVERTERS is llama.cpp's folder with convert_hf_to_gguf.py and convert_lora_to_gguf.py; BASE a transformers folder or a
GGUF file. Prints one line of JSON: {"verdict": "refused" | "wrong" | "taken", "why": ...}.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

NEAR = 1e-4
"""Of the largest logit: more apart than float32 sums in another order."""


class Refused(Exception):
    """The server stopped with an error, which the message is."""


def converted(converter: Path, *words: str | Path) -> None:
    """Run one of llama.cpp's converters."""
    done = subprocess.run([sys.executable, converter, *words], capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        raise RuntimeError(done.stderr)
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1])


def base_file(converters: Path, base: Path) -> Path:
    """The base in float32, converted once."""
    file = base / "base.gguf"
    if not file.exists():
        converted(converters / "convert_hf_to_gguf.py", base, "--outfile", file, "--outtype", "f32")
    return file


class Model:
    """A model in llama.cpp, with or without an adapter; keys and values in float32."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        import llama_cpp as lib

        self.lib: Any = lib
        self.complaints: list[str] = []
        self._log = lib.llama_log_callback(self._hear)
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not self.model:
            raise Refused(self.why())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 512, 512, 512, 1
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = 0  # none
        self.context = lib.llama_init_from_model(self.model, params)
        if adapter is not None:
            loaded = lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            if not loaded:
                raise Refused(self.why())
            array = (lib.llama_adapter_lora_p_ctypes * 1)(loaded)
            if lib.llama_set_adapters_lora(self.context, array, 1, (ctypes.c_float * 1)(1.0)):
                raise Refused(self.why())

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level >= 4:
            self.complaints.append(text.decode(errors="replace").strip())

    def why(self) -> str:
        """The last error that llama.cpp logged."""
        return self.complaints[-1] if self.complaints else "no reason given"

    def logits(self, ids: list[int]) -> numpy.ndarray:
        """Of every position, [tokens, vocabulary], from an empty cache."""
        lib, count = self.lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
            batch.seq_id[at][0] = 0
        if lib.llama_decode(self.context, batch):
            raise Refused(self.why())
        words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        rows = numpy.ctypeslib.as_array(lib.llama_get_logits(self.context), shape=(count, words)).copy()
        lib.llama_batch_free(batch)
        return rows


def verdict(converters: Path, base: Path, case: Path, adapter: Path | None = None) -> dict[str, str]:
    """Convert, load, compute and compare."""
    saved = load_file(case / "logits.safetensors")
    ids, expected = saved["ids"][0], saved["logits"][0]
    try:
        file = base_file(converters, base)
        if adapter is None:
            adapter = case / "converted.gguf"
            converted(converters / "convert_lora_to_gguf.py", "--base", base, "--outfile", adapter, case / "adapter")
        seen = Model(file, adapter).logits(ids.tolist())
    except Refused as error:
        return {"verdict": "refused", "why": str(error)}
    apart = float(numpy.abs(seen - expected).max() / numpy.abs(expected).max())
    return {"verdict": "taken" if apart < NEAR else "wrong", "why": f"{apart:.1e} apart"}


if __name__ == "__main__":
    print(json.dumps(verdict(*[Path(word) for word in sys.argv[1:]])))
