"""save and load: one adapter, one folder. `docs/format.md` specifies what lies in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
import safetensors.torch
from torch import Tensor, nn

import veneer
from veneer import adapter as verbs
from veneer import files, methods, places
from veneer.delta import Method, Place
from veneer.errors import AdapterError, CorruptFile, FileError, MethodError, NoSuchPlace, WrongModel, closest, listed
from veneer.handle import Adapter, Claim, runs
from veneer.interop import adapterhub, peft
from veneer.interop.peft.common import Entry, NotInPEFT, fill
from veneer.references import OWN_TENSORS, Reference, put_back, take_out
from veneer.seams import transformers

RECIPE = "veneer.json"
PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
VERSION = 1


class _Place(pydantic.BaseModel, extra="forbid", strict=True):
    path: str
    spans: list[tuple[int, int]] | None = None
    tied: list[str] = []


class _Claim(pydantic.BaseModel, extra="forbid", strict=True):
    method: str
    options: dict[str, Any]
    where: str
    places: list[_Place] = pydantic.Field(min_length=1)


class _Tensors(pydantic.BaseModel, extra="forbid", strict=True):
    file: str
    sha256: str


class Recipe(pydantic.BaseModel, extra="forbid", strict=True):
    """`veneer.json`: all that is needed to build the adapter again, but for its tensors."""

    format: int
    veneer: str
    base: dict[str, str]
    claims: list[_Claim] = pydantic.Field(min_length=1)
    also_train: list[str]
    tensors: _Tensors
    parts: dict[str, Reference] = {}


def save(adapter: Adapter, folder: str | Path, *, parts: Mapping[str, str | Path] | None = None) -> Path:
    """Write an adapter into `folder` itself, and return the folder.

    Where Hugging Face PEFT has the method, `adapter_config.json` and `adapter_model.safetensors` are PEFT's own, which
    PEFT, vLLM and llama.cpp's converter read; otherwise the tensors are in `veneer.safetensors`. `veneer.json` is the
    recipe in both cases. The same adapter always gives the same bytes. Files are written under temporary names, synced
    and renamed.

    A fusion may be saved by reference: `parts` names, for some or all of its parts, the folder or Hub id that each was
    saved in, where `load` will look for them; the folder is then small, and not whole by itself.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FileError(f"{folder} is a file; save an adapter into a folder.")
    if any(claim.delta.waits for claim in adapter.claims):
        raise AdapterError(f"{adapter!r} has not started yet. Call veneer.calibrate first.")
    adapter = adapter.folded()
    contents: dict[str, bytes] = {}
    references: dict[str, Reference] = {}
    name = OWN_TENSORS
    try:
        tensors, config = peft.to_files(adapter)
        contents = {PEFT_TENSORS: packed(tensors), PEFT_CONFIG: files.to_json(config)}
        name = OWN_TENSORS if config["peft_type"] in peft.ROUNDED else PEFT_TENSORS
    except NotInPEFT:
        pass
    if name == OWN_TENSORS:
        named = {part: (str(where), located(where, None)) for part, where in (parts or {}).items()}
        tensors, references = take_out(adapter.state_dict(), named, folder)
        contents = {OWN_TENSORS: packed(tensors), **contents}
    elif parts:
        raise AdapterError(f"{adapter!r} is no fusion, so it has no parts to refer to. Leave `parts` out.")
    recipe = _recipe(adapter, name, contents[name], references)
    contents[RECIPE] = files.to_json(recipe.model_dump(exclude=None if references else {"parts"}))
    files.write(folder, contents)
    for stale in {OWN_TENSORS, PEFT_TENSORS, PEFT_CONFIG} - contents.keys():
        (folder / stale).unlink(missing_ok=True)
    return folder


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file as PEFT writes it; the same tensors always give the same bytes."""
    return safetensors.torch.save(_apart(tensors), metadata={"format": "pt"})


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """That file, written from the tensors' own memory, which `packed` takes once more, and synced."""
    safetensors.torch.save_file(_apart(tensors), path, metadata={"format": "pt"})
    files.sync(path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; one whose memory has come already is copied, which safetensors wants."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        found[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return found


def _recipe(adapter: Adapter, name: str, packed: bytes, references: dict[str, Reference]) -> Recipe:
    return Recipe(
        format=VERSION,
        veneer=veneer.__version__,
        base=transformers.describe(adapter.model),
        also_train=list(adapter.also_train),
        claims=[
            _Claim(
                method=type(claims[0].method).__name__,
                options=_options(claims[0].method),
                where=claims[0].where,
                places=[_place(claim.place) for claim in claims],
            )
            for claims in runs(adapter.claims)
        ],
        tensors=_Tensors(file=name, sha256=files.digest(packed)),
        parts=references,
    )


def _options(method: Method) -> dict[str, Any]:
    """The options as the recipe holds them; a method within is {"method": its name, "options": its own}."""
    return {field.name: _plain(vars(method)[field.name]) for field in fields(method)}


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return {"method": type(value).__name__, "options": _options(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _place(place: Place) -> _Place:
    spans = None if place.spans is None else list(place.spans)
    return _Place(path=place.path, spans=spans, tied=[other.path for other in place.tied])


def load(model: nn.Module, folder: str | Path, *, name: str = "default", revision: str | None = None) -> Adapter:
    """Attach the adapter of a folder, or of a Hub id, and make it the active one.

    Reads Veneer's folders and Hugging Face PEFT's, safetensors only, and AdapterHub's (bottleneck, prefix, LoRA and
    fusion). Every key, shape and number is checked before the model is touched. Raises CorruptFile, UnsafeFile,
    WrongModel or FileError, naming file and key.
    """
    path = located(folder, revision)
    if (path / RECIPE).exists():
        return _load_own(model, path, name)
    if adapterhub.recognises(path):
        return _load_adapterhub(model, path, name)
    if (path / PEFT_CONFIG).exists():
        return _load_peft(model, path, name)
    raise no_adapter(path)


def no_adapter(path: Path) -> FileError:
    """What to raise of a folder that is none of an adapter."""
    return FileError(f"{path} holds no adapter: neither {RECIPE} nor {PEFT_CONFIG} is there.")


def located(folder: str | Path, revision: str | None) -> Path:
    """The folder itself, or the one that a Hub id was fetched into; FileError where there is neither."""
    path = Path(folder)
    if path.is_dir():
        if revision is not None:
            raise FileError(f"{folder} is a local folder, which has no revision '{revision}'. Leave revision out.")
        return path
    if path.exists() or path.is_absolute() or str(folder).count("/") != 1:
        raise FileError(f"{folder} is no folder and no Hub id of the form 'owner/name'.")
    from huggingface_hub import snapshot_download

    wanted = [RECIPE, OWN_TENSORS, PEFT_CONFIG, PEFT_TENSORS, *adapterhub.FILES]
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=wanted))
    except Exception as error:  # every client error is the user's to act on, whatever its class
        raise FileError(f"{folder} is no local folder, and fetching it from the Hub failed: {error}") from error


def _near(path: Path, folder: str) -> Path:
    """Where a part is: seen from the fusion's folder, or on the Hub."""
    if not folder.startswith("."):
        return located(folder, None)
    if not (path / folder).is_dir():
        raise FileError(f"{path / folder}, where a part of the fusion in {path} lies, is gone. Put it back.")
    return path / folder


def _load_own(model: nn.Module, path: Path, name: str) -> Adapter:
    recipe = read_recipe(path)
    tensors = files.read_tensors(path / recipe.tensors.file)  # a damaged file is named as such before its checksum
    _check_sum(path, recipe)
    entries = [entry_of(claim, path) for claim in recipe.claims]
    claims = _claims(model, entries, path, recipe.base)
    expected = expected_in(recipe.tensors.file, claims, path)
    if recipe.parts:
        tensors |= put_back(expected, {part: (one, _near(path, one.folder)) for part, one in recipe.parts.items()})
    compare(expected, tensors, path / recipe.tensors.file, recipe.base)
    fill_from(recipe.tensors.file, claims, tensors)
    verify(claims, path / recipe.tensors.file)
    return verbs.install(model, name, claims, recipe.also_train)


def _load_peft(model: nn.Module, path: Path, name: str) -> Adapter:
    config = files.read_json(path / PEFT_CONFIG)
    tensors = peft.without_copies(files.read_tensors(path / PEFT_TENSORS), config)
    entries = peft.from_config(model, config, set(tensors), str(path / PEFT_CONFIG))
    base = peft_base(config)
    claims = _claims(model, entries, path, base)
    try:
        expected = peft.to_tensors(claims)
    except NotInPEFT as error:
        raise CorruptFile(f"{path / PEFT_TENSORS}: some tensors are missing: {error}.") from None
    compare(expected, tensors, path / PEFT_TENSORS, base)
    fill_from(PEFT_TENSORS, claims, tensors)
    verify(claims, path / PEFT_TENSORS)
    return verbs.install(model, name, claims, [str(module) for module in config.get("modules_to_save") or []])


def _load_adapterhub(model: nn.Module, path: Path, name: str) -> Adapter:
    found = adapterhub.read(model, path)
    claims = _claims(model, found.entries, path, found.base)
    compare(expected_in(OWN_TENSORS, claims, path), found.tensors, found.file, found.base)
    fill_from(OWN_TENSORS, claims, found.tensors)
    verify(claims, found.file)
    return verbs.install(model, name, claims)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a folder; CorruptFile where a field is missing, left over or of the wrong type."""
    content = files.read_json(path / RECIPE)
    try:
        recipe = Recipe.model_validate_json(files.to_json(content))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(
            f"{path / RECIPE}: {field}: {first['msg']}. Restore the file from where it came from."
        ) from None
    if recipe.format != VERSION:
        raise FileError(
            f"{path / RECIPE} has format {recipe.format}; this Veneer reads {VERSION}. Install a newer Veneer."
        )
    if recipe.tensors.file not in (OWN_TENSORS, PEFT_TENSORS):
        raise CorruptFile(
            f"{path / RECIPE} names '{recipe.tensors.file}' as its tensors, which no adapter is stored in."
        )
    return recipe


def _check_sum(path: Path, recipe: Recipe) -> None:
    file = path / recipe.tensors.file
    if files.digest(file.read_bytes()) != recipe.tensors.sha256:
        raise CorruptFile(
            f"{file} is not the file that {RECIPE} describes: it was changed, or a save was interrupted. Save again, "
            f"or delete {RECIPE} to load it as a plain PEFT folder."
        )


def entry_of(claim: _Claim, path: Path) -> Entry:
    """A claim of a recipe as a method at places."""
    built = _method(claim.method, claim.options, path)
    named = [(place.path, None if place.spans is None else tuple(place.spans)) for place in claim.places]
    named += [(path, None) for place in claim.places for path in place.tied]
    return Entry(built, claim.where, named)


def _method(name: str, options: dict[str, Any], path: Path) -> Method:
    """The method that a recipe describes, with those within it."""
    method = vars(methods).get(name)
    if name not in methods.__all__ or not isinstance(method, type) or not issubclass(method, Method):
        raise FileError(
            f"{path / RECIPE} uses the method '{name}', which this Veneer does not have."
            f"{closest(name, methods.__all__)} Install a newer Veneer."
        )
    try:
        return method(**{key: _unplain(value, path) for key, value in options.items()})
    except (MethodError, TypeError) as error:
        raise CorruptFile(f"{path / RECIPE}: {error}") from None


def _unplain(value: Any, path: Path) -> Any:
    """What `_plain` made plain; options are immutable, so what JSON holds as a list was a tuple."""
    if isinstance(value, list):
        return tuple(_unplain(each, path) for each in value)
    if not isinstance(value, dict):
        return value
    name, options = value.get("method"), value.get("options")
    if len(value) == 2 and isinstance(name, str) and isinstance(options, dict):
        return _method(name, options, path)
    return {key: _unplain(each, path) for key, each in value.items()}


def _claims(model: nn.Module, entries: Sequence[Entry], path: Path, base: dict[str, str]) -> list[Claim]:
    try:
        return [
            claim
            for entry in entries
            for claim in verbs.build(
                entry.method, places.exact(model, entry.method.unit, entry.places), entry.where, filled=True
            )
        ]
    except (MethodError, RuntimeError, MemoryError) as error:
        raise CorruptFile(f"{path} asks for an adapter that cannot be built: {error}") from None
    except NoSuchPlace as error:
        raise WrongModel(f"{path} was made for {_described(base)}, another model: {error}") from None


def _described(base: dict[str, str]) -> str:
    return " ".join(part for part in (base.get("class", "a model"), base.get("name_or_path", "")) if part)


def expected_in(name: str, claims: Sequence[Claim], path: Path) -> dict[str, Tensor]:
    """By key what a folder's file of this name must hold for these claims; shares memory with them."""
    if name != PEFT_TENSORS:
        return dict(Adapter("", nn.Module(), claims).named_tensors())
    try:
        return peft.to_tensors(claims)
    except NotInPEFT as error:
        raise CorruptFile(f"{path / RECIPE} does not belong to {name}: {error}.") from None


def fill_from(name: str, claims: Sequence[Claim], tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a file of this name into the claims."""
    if name == PEFT_TENSORS:
        peft.from_tensors(claims, tensors)
        return
    for key, tensor in Adapter("", nn.Module(), claims).named_tensors():
        fill(tensor, tensors[key])


def verify(claims: Sequence[Claim], file: Path) -> None:
    """CorruptFile where numbers that were filled in are none that a method can have."""
    for claim in claims:
        try:
            claim.delta.verify()
        except MethodError as error:
            raise CorruptFile(f"{file}: {claim.place.path} {error}") from None


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], file: Path, base: dict[str, str]) -> None:
    """CorruptFile or WrongModel where keys, kinds or shapes are not those that are expected."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"{listed(missing)} missing"] if missing else []
        parts += [f"{listed(extra)} left over"] if extra else []
        raise CorruptFile(f"{file}: {'; '.join(parts)}. The tensors do not belong to this recipe and model.")
    for key, tensor in expected.items():
        if tensor.is_floating_point() != found[key].is_floating_point():
            raise CorruptFile(f"{file}: {key} is stored as {found[key].dtype}, where an adapter has {tensor.dtype}.")
        if tensor.shape != found[key].shape:
            raise WrongModel(
                f"{file}: {key} is {tuple(found[key].shape)}, and this model needs {tuple(tensor.shape)}; the adapter "
                f"was made for {_described(base)}."
            )


_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def peft_base(config: Mapping[str, Any]) -> dict[str, str]:
    """The name of the base that PEFT's config has, or AdapterHub's."""
    return {"name_or_path": str(config.get("base_model_name_or_path") or config.get("model_name") or "")}


def base_of(path: Path) -> dict[str, str]:
    """What a folder says of the model it was made on: `class` and `name_or_path`, where it says so."""
    if (path / RECIPE).exists():
        return read_recipe(path).base
    if not (path / PEFT_CONFIG).exists():
        raise no_adapter(path)
    config = files.read_json(path / PEFT_CONFIG)
    return {"class": _AUTO.get(str(config.get("task_type")), ""), **peft_base(config)}
