"""What a file is that no audio is read from, by the bytes that it begins with, so that a message tells the reason."""

from __future__ import annotations

import os

from nest_fn.files.inputs import open_plain, other_format

UNREAD_SUFFIXES = (
    ".m4a", ".mp4", ".m4b", ".aac", ".wma", ".amr", ".webm", ".mka", ".3gp", ".ac3", ".ape", ".wv", ".mpc", ".tta",
)  # fmt: skip
"""Endings of names of audio files that soundfile does not read: they are named, and not passed over."""

HEAD = 64  # bytes by which a file is recognised
_CONVERT = "which libsndfile does not read: convert it, for example by ffmpeg to FLAC"
_APPLE_DOUBLE = b"\0\x05\x16\x07"
_KINDS = (
    (4, b"ftyp", f"MPEG-4 audio or video, {_CONVERT}"),
    (0, b"\x1aE\xdf\xa3", f"Matroska or WebM, {_CONVERT}"),
    (0, b"0&\xb2u\x8ef\xcf\x11", f"Windows Media, {_CONVERT}"),
    (0, b"#!AMR", f"AMR, {_CONVERT}"),
    (0, b"ADIF", f"AAC, {_CONVERT}"),
    (0, b"\xff\xf1", f"AAC, {_CONVERT}"),
    (0, b"\xff\xf9", f"AAC, {_CONVERT}"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: git lfs pull brings the file"),
    (0, _APPLE_DOUBLE, "a file of macOS beside the one that is meant, without audio"),
)
_PAGE = (b"<!doctype", b"<html", b"<?xml")


def kind_of(head: bytes) -> str | None:
    """What a file is that begins with ``head``, and what to do with it; None if it is not known."""
    for place, mark, kind in _KINDS:
        if head[place:].startswith(mark):
            return kind
    if head.lstrip().lower().startswith(_PAGE):
        return "a web page or another text, as a failed download leaves it: fetch the file again"
    return other_format(head)


def is_companion(path: str) -> bool:
    """Whether macOS wrote a file ``._a.wav`` beside an ``a.wav``, for what other file systems have no place for."""
    if not os.path.basename(path).startswith("._"):
        return False
    try:
        with open_plain(path) as file:
            return file.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE
    except OSError:
        return False
