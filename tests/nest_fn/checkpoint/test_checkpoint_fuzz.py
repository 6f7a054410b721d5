"""Whatever stands in a checkpoint's files, reading them ends in ``CheckpointError`` or in trees: nothing else."""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.checkpoint.folder import _sealed
from nest_fn.errors import CheckpointError
from nest_fn.interop.convert import read_any
from nest_fn.interop.nemo_archive import write_nemo

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints" / "schema1"
READERS: list[Callable[[Path], Any]] = [
    checkpoint.load, checkpoint.read_checkpoint, checkpoint.read_meta, checkpoint.verify, read_any
]  # fmt: skip
few_examples = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

NAMES = st.sampled_from(
    ["params.pt", "config.yaml", "meta.json", "..", ".", "", "/", "\0", "a\0b", "\ud800", "x" * 300, "../meta.json",
     "schema", "step", "params", "file", "structure", "bytes", "sha256", "float32 [2]", "0", "state"]
)  # fmt: skip
NUMBERS = st.integers() | st.sampled_from([10**400, -(10**400), 2**63, 2**64, 1e308, -0.0, 1.0, True])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)


def only_ours(read: Callable[[Path], Any], path: Path) -> str:
    """What a reader says that refuses ``path``, or nothing. Any other exception comes through."""
    try:
        read(path)
    except CheckpointError as error:
        return str(error)
    return ""


def check(path: Path, *readers: Callable[[Path], Any]) -> None:
    """All readers read or refuse, naming the path, in words that fit a screen."""
    for read in readers:
        told = only_ours(read, path)
        assert not told or (str(path) in told and len(told) < 5000)


# The folder's description of itself ----------------------------------------------------------------------------------


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every branch and leaf below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, below in items for found in [(*place, name), *_places(below, (*place, name))]]


@functools.cache
def _whole() -> str:
    """A true ``meta.json``."""
    return (GOLDEN / "folder.pt" / "meta.json").read_text()


def _content() -> dict[str, Any]:
    """Its content, without its own digest."""
    content = json.loads(_whole())
    del content["sha256"]
    return content


def _changed(data: st.DataObject, content: dict[str, Any]) -> dict[str, Any]:
    """One to three entries with other values, under other names, or away."""
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(content)
        if not places:
            break
        *way, last = data.draw(st.sampled_from([place for place in places if len(place) < 4] or places))
        branch = content
        for name in way:
            branch = branch[name]
        what = data.draw(st.sampled_from(["replace", "remove", "rename", "wrap", "add"]))
        if what == "remove":
            branch.pop(last)
        elif what == "rename" and isinstance(branch, dict):
            branch[data.draw(NAMES)] = branch.pop(last)
        elif what == "wrap":
            branch[last] = [branch[last]] if data.draw(st.booleans()) else {data.draw(NAMES): branch[last]}
        elif what == "add" and isinstance(branch, dict):
            branch[data.draw(NAMES)] = data.draw(JSON)
        else:
            branch[last] = copy.deepcopy(data.draw(JSON))
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, whose ``meta.json`` the tests write over."""
    return shutil.copytree(GOLDEN / "folder.pt", tmp_path_factory.mktemp("fuzz") / "step_00000001")


@few_examples
@given(data=st.data(), sealed=st.sampled_from([True, True, True, False]))
def test_meta_of_other_values(folder: Path, data: st.DataObject, sealed: bool) -> None:
    """Changed with its digest, as by someone who knows the format, or without."""
    changed = _changed(data, _content())
    (folder / "meta.json").write_text(_sealed(changed) if sealed else json.dumps({"sha256": "0" * 64, **changed}))
    check(folder, *READERS)
    path, problems = checkpoint.newest_valid(folder.parent)
    assert (path == folder and not problems) or (path is None and len(problems) == 1)


def _deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


FILE = {"bytes": 1, "sha256": "0" * 64}
WICKED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name too long": lambda c: c["files"].update({"x" * 300: FILE}),
    "name without text": lambda c: c["files"].update({"": FILE}),
    "name with a zero": lambda c: c["files"].update({"a\0b": FILE}),
    "name of half a letter": lambda c: c["files"].update({"\ud800": FILE}),
    "the folder above": lambda c: c["files"].update({"..": FILE}),
    "itself": lambda c: c["files"].update({"meta.json": FILE}),
    "size beyond all": lambda c: c["files"]["params.pt"].update(bytes=10**400),
    "versions in a list": lambda c: c.update(versions=[[]]),
    "config for a tree": lambda c: c["trees"]["params"].update(file="config.yaml"),
    "another tree's file": lambda c: c["trees"]["params"].update(file="state.pt"),
    "files in a list": lambda c: c["trees"]["params"].update(file=["params.pt"]),
    "no trees": lambda c: c.update(trees={}),
    "a number for a tree": lambda c: c["trees"]["params"].update(structure=7),
    "nothing for a tree": lambda c: c["trees"]["params"].update(structure=None),
    "deeper than Python's stack": lambda c: c["trees"]["params"].update(structure=_deep(900)),
    "deep": lambda c: c["trees"]["params"]["structure"].update(deep=_deep(480), other=None),
}


@pytest.mark.parametrize("case", WICKED)
def test_meta_with_wicked_values(folder: Path, case: str) -> None:
    content = _content()
    WICKED[case](content)
    (folder / "meta.json").write_text(_sealed(content))
    assert str(folder) in only_ours(checkpoint.load, folder)
    check(folder, *READERS)


TEXTS = [
    "", "null", "[]", "{", "NaN", "1" * 5000, "[" * 100_000, '{"a":' * 100_000, '{"format": "nest_fn", "schema": 1}',
    '{"format": "nest_fn", "schema": Infinity}', '{"format": "nest_fn", "schema": 1e999}', '"\\ud800"', "\ufeff{}",
    *('{"format": "nest_fn", "schema": 1, "a": ' + "[" * n + "]" * n + "}" for n in (900, *range(970, 1000, 3))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_meta_of_other_texts(folder: Path, number: int) -> None:
    (folder / "meta.json").write_text(TEXTS[number], encoding="utf-8")
    for read in READERS:
        assert "meta.json" in only_ours(read, folder)


@few_examples
@given(data=st.data())
def test_meta_of_other_bytes(folder: Path, data: st.DataObject) -> None:
    """Cut, doubled, overwritten anywhere: refused, or of the same meaning, as with white space."""
    whole = _whole().encode()
    start, stop = sorted((data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))))
    doubled = whole[start:stop] * 2
    put = data.draw(st.binary(max_size=8) | st.sampled_from([b"\xff", b"}", b"[[", b"1e999", b"-", doubled]))
    (folder / "meta.json").write_bytes(whole[:start] + put + whole[stop:])
    check(folder, *READERS)


# Files of any kind ---------------------------------------------------------------------------------------------------


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in dict(members).items():
            archive.writestr(name, content)
    return file.getvalue()


def _tarred(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


RANDOM = st.binary(max_size=600)
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(
            ["model_config.yaml", "./model_config.yaml", "model_weights.ckpt", "a/data.pkl", "a/version", "a/byteorder",
             "a/data/0", "a/.format_version", "x", "../x", "/x"]
        ),
        st.binary(max_size=80) | st.sampled_from(
            [b"little", b"3\n", b"\x80\x02}.", b"\x80\x02]q\x00.", b"{a: [", b"encoder: {d_model: 8}", b"a: &a [*a]",
             _saved({}), _saved({"a": torch.zeros(1)})]
        ),
    ), max_size=5,
)  # fmt: skip
STARTS = [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\x00", bytes(257) + b"ustar\x0000", b"\x80\x02}q\x00"]
HEADERS = st.builds(  # of safetensors
    lambda size, text: struct.pack("<Q", size) + text,
    st.sampled_from([0, 2, 64, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 200),
    st.sampled_from(
        [b"{}", b"{" * 64, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b'{"__metadata__":{}}']
    )
    | RANDOM.map(lambda content: b"{" + content),
)
ANY = st.one_of(
    st.builds(bytes.__add__, st.sampled_from(STARTS), RANDOM), HEADERS, MEMBERS.map(_zipped), MEMBERS.map(_tarred),
    st.one_of(RANDOM, MEMBERS.map(_tarred)).map(gzip.compress),
)  # fmt: skip
SUFFIX = st.sampled_from([".nemo", ".ckpt", ".pt", ".safetensors", "", ".txt"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # zipfile's, of names that come twice
@settings(few_examples, max_examples=150)
@given(content=ANY, suffix=SUFFIX)
def test_files_of_any_content(tmp_path: Path, content: bytes, suffix: str) -> None:
    """Noise, and archives of noise, behind the first bytes of every kind of file that is read."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert str(path) in only_ours(read_any, path)
    check(path, checkpoint.load)


KEYS = st.sampled_from(["state_dict", "hyper_parameters", "model_state_dict", "config", "cfg", "tensors", "metadata",
                        "encoder", "encoder.weight", "d_model", "n_layers", "preprocessor", "masking"])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | KEYS | st.binary(max_size=3)
    | st.sampled_from([torch.zeros(2), torch.zeros(0, 3, dtype=torch.int8), torch.eye(2).to_sparse(), torch.float16]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS | st.integers() | st.none(), below, max_size=4),
    max_leaves=8,
)  # fmt: skip
PAIRS = st.sampled_from(
    [("state_dict", "hyper_parameters"), ("model_state_dict", "config"), ("tensors", "metadata"), ("x", "y")]
)


@settings(few_examples, max_examples=150)
@given(pair=PAIRS, first=VALUES, second=VALUES, suffix=SUFFIX)
@example(pair=("model_state_dict", "config"), first={}, second={1: 2}, suffix=".pt")
@example(pair=("model_state_dict", "config"), first={}, second={"encoder": {1: 2}}, suffix=".pt")
@example(pair=("model_state_dict", "config"), first={}, second={"encoder": {"d_model": float("nan")}}, suffix=".pt")
@example(pair=("state_dict", "hyper_parameters"), first={}, second={None: {}, "cfg": {"encoder": [1]}}, suffix=".ckpt")
def test_pickles_of_other_values(tmp_path: Path, pair: tuple[str, str], first: Any, second: Any, suffix: str) -> None:
    """Files that torch.save wrote, whose entries have the right names and other things in them."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(_saved(dict(zip(pair, (first, second), strict=True))))
    assert str(path) in only_ours(read_any, path)
    check(path, checkpoint.load)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A whole model in files of every kind."""
    folder = tmp_path_factory.mktemp("models")
    write_nemo(folder / "a.nemo", *checkpoint.load(GOLDEN / "model.pt"))
    plain = (folder / "a.nemo").read_bytes()
    files = [
        plain,
        gzip.compress(plain, 1),
        *((GOLDEN / f"model{end}").read_bytes() for end in (".pt", ".safetensors")),
    ]
    return files


@settings(few_examples, max_examples=80)
@given(data=st.data(), suffix=SUFFIX)
def test_files_with_other_bytes(tmp_path: Path, models: list[bytes], data: st.DataObject, suffix: str) -> None:
    """Whole models with bytes written over, taken out or put in, mostly where the headers are."""
    content = data.draw(st.sampled_from(models).map(bytearray))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)) | st.integers(0, 2000) | st.integers(-2000, 0))
        start = min(max(start % (len(content) + 1), 0), len(content))
        put = data.draw(st.binary(max_size=8))
        content[start : start + data.draw(st.sampled_from([0, len(put), 100, 5000]))] = put
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    check(path, read_any, checkpoint.load)
