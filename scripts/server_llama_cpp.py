"""What llama.cpp does with adapters' folders, which its own converter converts: run by `check_servers.py`.

    python scripts/server_llama_cpp.py SOURCES < cases.json > verdicts.json

SOURCES is llama.cpp's folder with convert_hf_to_gguf.py and convert_lora_to_gguf.py; the package llama_cpp runs what
they write. Each case has a process of its own, because llama.cpp ends the process where a shape does not fit. Tokens go
through the whole model, and all logits are compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

NEAR = 1e-4
"""Of the largest logit: more apart than float32 sums in another order."""


class Refused(Exception):
    """The server stopped with an error, which the message is."""


def converted(converter: Path, *words: str | Path) -> None:
    """Run one of llama.cpp's converters in this process."""
    sys.argv = [str(converter), *map(str, words)]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            runpy.run_path(str(converter), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            errors = [line for line in told.getvalue().splitlines() if line.startswith("ERROR")]
            raise Refused(f"converter: {errors[0] if errors else stop.code}") from None
    except ImportError:  # what the converter needs, not what it thinks of the adapter
        raise
    except Exception as error:
        raise Refused(f"converter: {type(error).__name__}: {error}") from None


def base_file(converters: Path, base: Path, file: Path) -> Path:
    """The base in float32, converted once."""
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


def verdict(sources: Path, base: Path, case: Path) -> dict[str, str]:
    """Convert, load, compute and compare."""
    saved = load_file(case / "logits.safetensors")
    ids, expected = saved["ids"][0], saved["logits"][0]
    adapter = case / "converted.gguf"
    try:
        file = base_file(sources, base, base / "base.gguf")
        converted(sources / "convert_lora_to_gguf.py", "--base", base, "--outfile", adapter, case / "adapter")
        seen = Model(file, adapter).logits(ids.tolist())
    except Refused as error:
        return {"verdict": "refused", "why": str(error)}
    apart = float(numpy.abs(seen - expected).max() / numpy.abs(expected).max())
    return {"verdict": "taken" if apart < NEAR else "wrong", "why": f"{apart:.1e} apart"}


def apart(call: Any, *words: Any) -> dict[str, str]:
    """The answer of a call in a forked process; refused where the process dies."""

    def told(pipe: Any) -> None:
        try:
            pipe.send(call(*words))
        except Exception:
            pipe.send({"verdict": "failed", "why": traceback.format_exc()})

    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=told, args=(theirs,))
    process.start()
    theirs.close()
    try:
        answer: dict[str, str] = ours.recv()
    except EOFError:
        process.join()
        return {"verdict": "refused", "why": f"the process ended with {process.exitcode}"}
    return answer


def main() -> None:
    """Verdicts on all the cases."""
    sources = Path(sys.argv[1])
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or it starts a debugger
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    for name in ("torch", "transformers", "gguf", "conversion"):  # once, before the forks
        importlib.import_module(name)
    answers = {}
    for case in json.load(sys.stdin):
        answers[case["folder"]] = [apart(verdict, sources, Path(case["base"]), Path(case["folder"]))]
        print(case["name"], answers[case["folder"]], file=sys.stderr, flush=True)
    print(json.dumps({"standing": [], "answers": answers}))


if __name__ == "__main__":
    main()
