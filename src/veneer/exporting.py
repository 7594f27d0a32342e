"""Adapters in the files of other programs, in the form that those programs take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from veneer import files, store
from veneer.arithmetic import to_lora
from veneer.dequantizing import dequantize
from veneer.errors import AdapterError, FileError, MethodError, listed
from veneer.handle import Adapter, handle, state_of
from veneer.interop import adapterhub, gguf, peft
from veneer.interop.peft.common import NotInPEFT
from veneer.interop.peft.uniform import uniform
from veneer.interop.servers import RANKS, SERVERS, Finding, Server, findings
from veneer.merging import detach, merge
from veneer.methods import FullFineTuning
from veneer.routing import activate
from veneer.seams import transformers

To = Literal["peft", "adapterhub", "gguf-lora", "merged"]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the folder, and what bringing each place to a lower rank left out (empty: nothing)."""

    folder: Path
    errors: Mapping[str, float] = field(default_factory=dict)


def export(
    model: nn.Module,
    adapter: Adapter | str,
    folder: str | Path,
    *,
    to: To = "peft",
    lora_rank: int | None = None,
    pad_rank: bool = False,
    drop_whole: bool = False,
) -> Exported:
    """Write an adapter into a new folder, in another program's files and nothing else.

    - "peft": Hugging Face PEFT's two files, which vLLM, SGLang and llama.cpp's converter read. A LoRA that starts as
      PiSSA, OLoRA or LoftQ becomes a plain one of twice the rank that acts on the untouched base.
    - "adapterhub": AdapterHub's folders, for bottleneck adapters, prefixes, LoRA and fusions of bottleneck adapters, on
      the families that `veneer.interop.adapterhub.LAYOUTS` names. A prefix's network is folded away.
    - "gguf-lora": `adapter.gguf` for llama.cpp, with the `gguf` package, on the families that
      `veneer.interop.gguf.FAMILIES` names. What llama.cpp would get wrong is refused, with the option that mends it.
    - "merged": a plain transformers model that behaves like the adapted one. The model in memory becomes that model,
      and the adapter is gone.

    `lora_rank` brings everything that can be merged (DoRA, VeRA, OFT, ...) to LoRA of this rank first, as
    `veneer.to_lora` does; `errors` says what that leaves out. `pad_rank` brings all LoRAs to one rank, the next that
    vLLM knows, and one scale: the same numbers without rank_pattern, alpha_pattern and rsLoRA. `drop_whole` leaves out
    what was trained whole (heads, biases, norms); the adapter then computes something else.

    Raises FileError where the folder exists or the program has no such adapter, MethodError for options that would
    change nothing, and what `veneer.to_lora` and `veneer.merge` raise.
    """
    adapter, folder = handle(model, adapter), Path(folder)
    if to not in get_args(To):
        raise FileError(f"to='{to}' is none of {', '.join(get_args(To))}.")
    _refuse_idle(adapter, to, lora_rank, pad_rank, drop_whole)
    if folder.exists():
        raise FileError(f"{folder} exists already; name a new folder.")
    if to == "merged":
        _merged(model, adapter, folder)
        return Exported(folder)
    with _as_lora(model, adapter, lora_rank) as (lora, errors):
        if drop_whole:
            lora = _without_whole(lora)
        if to == "adapterhub":
            _in_adapterhub(lora, folder)
            return Exported(folder, errors)
        tensors, config = _in_peft(lora, drop_whole)
        if pad_rank:
            tensors, config = uniform(tensors, config, _padded_rank(tensors))
        if to == "gguf-lora":
            with files.appearing(folder) as partial:
                gguf.write(partial / gguf.FILE, transformers.config(model), tensors, config)
            return Exported(folder, errors)
        files.write(folder, {store.PEFT_TENSORS: store.packed(tensors), store.PEFT_CONFIG: files.to_json(config)})
        return Exported(folder, errors)


def refusals(folder: str | Path, server: Server) -> list[Finding]:
    """What a server ("vllm", "sglang", "llama.cpp" or "peft") would refuse of a saved adapter, or get wrong, and why.

    Reads the folder (or Hub id) only: no model, no server. An empty list is good. Each finding has a `kind` ("refused",
    "wrong", or "setting" for an option that the server needs), says `what` it is, and names a `way_out`: an option of
    `veneer export`. Raises FileError where the folder holds no adapter.
    """
    if server not in SERVERS:
        raise FileError(f"'{server}' is none of {', '.join(SERVERS)}.")
    path = store.located(folder, None)
    if (path / store.PEFT_CONFIG).exists():
        config = files.read_json(path / store.PEFT_CONFIG)
        if "peft_type" in config:
            return findings(config, files.read_tensors(path / store.PEFT_TENSORS), server)
    elif not (path / store.RECIPE).exists():
        raise store.no_adapter(path)
    return findings(None, {}, server)


def _refuse_idle(adapter: Adapter, to: str, lora_rank: int | None, pad_rank: bool, drop_whole: bool) -> None:
    """Options that would change nothing."""
    given = {"lora_rank": lora_rank is not None, "pad_rank": pad_rank, "drop_whole": drop_whole}
    idle = [name for name, is_given in given.items() if is_given and to == "merged"]
    if to == "adapterhub" and pad_rank:
        idle.append("pad_rank")
    if drop_whole and not any(isinstance(one.method, FullFineTuning) for one in adapter.claims):
        idle.append("drop_whole")
    if idle:
        raise MethodError(f"{listed(idle)} would change nothing in what is written. Leave it out.")


@contextmanager
def _as_lora(model: nn.Module, adapter: Adapter, rank: int | None) -> Iterator[tuple[Adapter, Mapping[str, float]]]:
    """The adapter as it is, or as LoRA of a rank for as long as the context lasts."""
    if rank is None:
        yield adapter.folded(), {}
        return
    before = state_of(model).routes.active
    name = next(name for n in range(len(state_of(model).adapters) + 1) if (name := f"export{n}") not in before)
    computed = to_lora(model, adapter, rank, name=name)
    try:
        yield computed.adapter, computed.errors
    finally:
        detach(model, computed.adapter)
        activate(model, *before)


def _without_whole(adapter: Adapter) -> Adapter:
    claims = [one for one in adapter.claims if not isinstance(one.method, FullFineTuning)]
    if not claims:
        raise FileError(f"{adapter!r} trained everything whole: drop_whole leaves nothing. Leave it out.")
    return Adapter(adapter.name, adapter.model, claims)


def _in_peft(adapter: Adapter, dropped: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if waiting := [one.place.path for one in adapter.claims if one.delta.waits]:
        raise AdapterError(f"{adapter!r} has not started yet at {listed(waiting)}. Call veneer.calibrate first.")
    try:
        tensors, config = peft.to_files(adapter)
    except NotInPEFT as error:
        raise FileError(
            f"PEFT's files cannot hold {adapter!r}: {error}. Where it changes weights, lora_rank=16 brings it to LoRA."
        ) from None
    return tensors, config | {"bias": "none"} if dropped and "bias" in config else config


def _in_adapterhub(adapter: Adapter, folder: Path) -> None:
    try:
        written = adapterhub.to_files(adapter)
    except adapterhub.NotInAdapterHub as error:
        raise FileError(f"AdapterHub's folders cannot hold {adapter!r}: {error}.") from None
    with files.appearing(folder) as partial:
        for within, (tensors, config) in written.items():
            fusion = "adapter_names" in config
            names = (
                (adapterhub.FUSION_TENSORS, adapterhub.FUSION_CONFIG)
                if fusion
                else (adapterhub.TENSORS, adapterhub.CONFIG)
            )
            files.write(partial / within, dict(zip(names, (store.packed(tensors), files.to_json(config)), strict=True)))


def _padded_rank(tensors: Mapping[str, Tensor]) -> int:
    """The next rank that vLLM knows."""
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key or "lora_embedding_A" in key]
    largest = max(ranks, default=1)
    if largest > RANKS[-1]:
        raise FileError(
            f"Rank {largest} is over {RANKS[-1]}, vLLM's largest. Bring it down with lora_rank={RANKS[-1]}."
        )
    return next(rank for rank in RANKS if rank >= largest)


def _merged(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    if others := [name for name in state_of(model).adapters if name != adapter.name]:
        raise AdapterError(f"{listed(others)} would stay on the merged model. Detach them first.")
    source = transformers.describe(model).get("name_or_path") or None
    merge(model, adapter, permanent=True)
    dequantize(model)
    transformers.save_language_model(model, source, folder)
