"""The reference's files: what it writes is read, what we write comes back, and nothing harmful gets in."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nest_fn import Config, forward
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.checkpoint.model_files import CheckpointError
from nest_fn.config.writer import to_text
from nest_fn.interop import nemo
from nest_fn.interop.convert import convert, read_any
from nest_fn.interop.nemo_archive import read_nemo, write_nemo
from nest_fn.interop.nemo_config import from_reference, to_reference
from nest_fn.interop.port_keywords import config_from_keywords
from nest_fn.layers.tree import flatten
from tests.nest_fn.checkpoint.test_checkpoint import SMALL, model, same

FOLDER = Path(__file__).parents[2] / "reference"
NEMO = "nemo.collections.asr.modules."


def reference_config(**encoder: Any) -> dict[str, Any]:
    """A ``model_config.yaml`` as the reference writes it, references and class paths included."""
    asr = {"_target_": NEMO + "ConformerEncoder", "feat_in": "${model.preprocessor.features}", "feat_out": -1,
           "n_layers": 1, "d_model": 8, "n_heads": 2, "subsampling": "dw_striding", "subsampling_factor": 8,
           "subsampling_conv_channels": 2, "conv_kernel_size": 9, "att_context_size": [-1, -1], "dropout_emb": 0.0,
           "dropout_att": 0.1, "sync_max_audio_length": True}  # fmt: skip
    return {
        "sample_rate": 16000, "num_classes": 8, "num_books": 1, "code_dim": 2, "squeeze_single": False,
        "mask_position": "pre_conv",
        "preprocessor": {"_target_": NEMO + "AudioToMelSpectrogramPreprocessor", "sample_rate": "${model.sample_rate}",
                         "window_size": 0.025, "features": 80, "n_fft": 512, "pad_value": 0.0},
        "spec_augment": {"_target_": NEMO + "SpectrogramAugmentation", "freq_masks": 0, "time_masks": 0},
        "masking": {"_target_": NEMO + "RandomBlockMasking", "feat_in": 80, "block_size": 40, "mask_prob": 0.01,
                    "freeze": True, "allow_overlap": True},
        "quantizer": {"_target_": NEMO + "RandomProjectionVectorQuantizer", "feat_in": 80, "code_dim": 2,
                      "num_books": 1, "num_classes": 8, "dist_fn": "l2", "combine_time_steps": 8},
        "encoder": asr | encoder,
        "decoder": {"_target_": NEMO + "MultiSoftmaxDecoder", "feat_in": "${model.encoder.d_model}", "num_classes": 8,
                    "num_decoders": 1, "use_bias": True},
        "loss": {"_target_": "nemo.collections.asr.losses.MultiMLMLoss", "combine_time_steps": 8, "num_decoders": 1},
        "optim": {"name": "adamw", "lr": 5.0, "sched": {"name": "NoamAnnealing", "d_model": 8, "warmup_steps": 100}},
        "target": "nemo.collections.asr.models.ssl_models.EncDecDenoiseMaskedTokenPredModel",
        "nemo_version": "2.0.0",
    }  # fmt: skip


def pack(path: Path, settings: Any, weights: Any, mode: str = "w", prefix: str = "./", **extra: bytes) -> Path:
    """An archive made by hand, as the reference makes one: a folder, the config, the weights."""
    body = io.BytesIO()
    torch.save(weights, body)
    text = settings if isinstance(settings, str) else to_text(settings)
    contents = {"model_config.yaml": text.encode(), "model_weights.ckpt": body.getvalue()} | extra
    with tarfile.open(path, mode) as archive:
        if prefix:
            folder = tarfile.TarInfo(prefix)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        for name, content in contents.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def state_dict(*overrides: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(nemo.to_state_dict(*model(*overrides)))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["./", ""])
@pytest.mark.parametrize("root", [True, False])
def test_an_archive_of_the_reference(tmp_path: Path, mode: str, prefix: str, root: bool) -> None:
    config = {"model": reference_config()} if root else reference_config()
    path = pack(tmp_path / "a.nemo", config, state_dict(), mode, prefix, **{"vocab.txt": b"unused"})
    params, state, cfg = read_nemo(path)
    ours = model()
    assert same(params, ours[0])
    assert same(state, ours[1])
    assert cfg.encoder.d_model == 8
    assert cfg.compat == "current"
    assert state["quantizer"]["codebooks"].dtype == torch.float64
    assert read_any(path, compat="legacy")[2].preprocessor.compat == "legacy"


def test_absent_keys_have_the_defaults_of_the_references_classes(tmp_path: Path) -> None:
    """Not those of the recipe: 20 ms windows and a decoder without bias, for example (reference 1.2, 2 to 5)."""
    config = reference_config()
    for section in ("preprocessor", "masking", "quantizer", "decoder"):
        for name in ("window_size", "n_fft", "block_size", "mask_prob", "allow_overlap", "dist_fn", "use_bias"):
            config[section].pop(name, None)
    for name in ("subsampling", "subsampling_factor", "conv_kernel_size", "dropout_emb", "dropout_att"):
        del config["encoder"][name]
    config["quantizer"]["combine_time_steps"] = config["loss"]["combine_time_steps"] = 4
    cfg = from_reference(config, "test")
    assert (cfg.preprocessor.window_length, cfg.preprocessor.fft_length) == (320, 512)
    assert (cfg.masking.block_size, cfg.masking.mask_prob, cfg.masking.allow_overlap) == (48, 0.5, False)
    assert (cfg.encoder.subsampling, cfg.encoder.subsampling_factor, cfg.encoder.conv_kernel_size) == (
        "striding",
        4,
        31,
    )
    assert (cfg.encoder.dropout_emb, cfg.encoder.dropout_att) == (0.1, 0.0)
    assert not cfg.decoder.use_bias
    assert cfg.quantizer.dist_fn == "cosine"


def test_post_conv_archives_hold_a_block_that_was_divided(tmp_path: Path) -> None:
    config = reference_config() | {"mask_position": "post_conv"}
    config["quantizer"]["combine_time_steps"] = 1
    as_recipe = from_reference(config, "test")
    for section in ("quantizer", "masking"):
        config[section]["feat_in"] = 8
    config["masking"]["block_size"] = 5
    config["loss"]["combine_time_steps"] = 1
    assert from_reference(config, "test") == as_recipe
    assert as_recipe.mask_block == 5


ROUND_TRIPS = [
    [], ["mask_position=post_conv"], ["num_books=2", "masking.freeze=false"], ["encoder.conv_norm_type=layer_norm"],
    ["encoder.use_bias=false", "encoder.xscaling=false"], ["encoder.untie_biases=false"], ["compat=legacy"],
    ["encoder.att_context_size=[[4, 3], [8, 1]]", "encoder.att_context_style=chunked_limited"], ["optim.sched=null"],
    ["optim.name=sgd", "optim.sched.name=constant"], ["loss.capacity=0.5", "masking.force_block=true"],
    ["data.train=[a.jsonl]", "trainer.seed=9"], ["encoder.feat_out=4", "encoder.subsampling=stacking"],
    ["preprocessor.normalize=fixed", "preprocessor.features=2", "preprocessor.fixed_mean=[0, 1]",
     "preprocessor.fixed_std=[1, 2]"],
    ["preprocessor.window_size=null", "preprocessor.n_window_size=320", "preprocessor.n_fft=null"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", ROUND_TRIPS, ids=lambda names: ",".join(names) or "plain")
def test_ours_to_nemo_and_back(tmp_path: Path, overrides: list[str]) -> None:
    params, state, cfg = model(*overrides)
    write_nemo(tmp_path / "a.nemo", params, state, cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_nemo(tmp_path / "a.nemo")
    assert same(params, back[0])
    assert same(state, back[1])
    assert back[2] == cfg
    with tarfile.open(tmp_path / "a.nemo", "r:") as archive:  # Python's own reader as the oracle of our writer
        assert archive.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        weights = archive.extractfile("./model_weights.ckpt")
        assert weights is not None
        content = torch.load(io.BytesIO(weights.read()), weights_only=True)
    assert list(content) == list(nemo.to_state_dict(params, state, cfg))


def test_nemo_config_is_the_references(tmp_path: Path) -> None:
    theirs = to_reference(Config())
    assert theirs["target"].endswith(".EncDecDenoiseMaskedTokenPredModel")
    assert {theirs[name]["_target_"].rpartition(".")[2] for name in ("encoder", "decoder", "loss", "quantizer")} == {
        "ConformerEncoder", "MultiSoftmaxDecoder", "MultiMLMLoss", "RandomProjectionVectorQuantizer"
    }  # fmt: skip
    assert "compat" not in theirs["encoder"]
    assert theirs["encoder"]["feat_in"] == 80
    assert theirs["encoder"]["att_context_size"] == [-1, -1]
    assert theirs["optim"]["sched"]["name"] == "NoamAnnealing"
    assert "nest_fn" not in theirs  # nothing here that the reference has no word for
    with pytest.raises(CheckpointError, match="no quantizer.input_norm=true and would compute other numbers"):
        to_reference(Config().override("quantizer.input_norm=true"))


def test_large_from_the_stored_list_of_its_tensors(tmp_path: Path) -> None:
    """The whole Large model, 450 MB: every name, shape and dtype that the reference saves."""
    stored = json.loads((FOLDER / "state_dict_large.json").read_text())
    generator = torch.Generator().manual_seed(0)
    weights = {
        entry["name"]: torch.rand(entry["shape"], generator=generator).to(getattr(torch, entry["dtype"]))
        for entry in stored["tensors"]
    }
    assert sum(leaf.numel() for leaf in weights.values()) == 113_144_385
    path = pack(tmp_path / "large.nemo", stored["config"], weights)
    params, state, cfg = read_nemo(path)
    path.unlink()
    back = nemo.to_state_dict(params, state, cfg)
    assert back.keys() == weights.keys()
    tables = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")  # follow from the config
    assert all(torch.equal(back[name], leaf) for name, leaf in weights.items() if name not in tables)
    assert back["quantizer.codebooks"].dtype == torch.float64


def test_released_large_has_18_layers_and_a_second_decoder(tmp_path: Path) -> None:
    """The published file in small: 18 layers by its own config, ``decoder_ssl.*`` passed over, counters missing."""
    weights = state_dict("encoder.n_layers=18")
    expected = model("encoder.n_layers=18")
    for name in ("weight", "bias"):
        weights[f"decoder_ssl.decoder_layers.0.{name}"] = torch.full_like(
            weights[f"decoder.decoder_layers.0.{name}"], 9
        )
    for name in [name for name in weights if name.endswith("num_batches_tracked")]:
        del weights[name]
    config = reference_config(n_layers=18)
    config["train_ds"] = {
        "manifest_filepath": "/data/a.json",
        "is_tarred": True,
        "tarred_audio_filepaths": "a_{0..3}.tar",
    }
    path = pack(tmp_path / "a.nemo", config, weights)
    with pytest.warns(UserWarning, match="settings of its training run are left out: 'train_ds.is_tarred'"):
        params, state, cfg = read_nemo(path)
    assert cfg.encoder.n_layers == 18
    assert same(params, expected[0])
    assert same(state["quantizer"], expected[1]["quantizer"])


def _changed(change: Any) -> OrderedDict[str, torch.Tensor]:
    weights = state_dict()
    change(weights)
    return weights


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("decoder.decoder_layers.0.bias"), r"'decoder.decoder_layers.0.bias' \[8\] is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' has no place"),
        (lambda w: w.update({"quantizer.proj.weight": torch.zeros(2, 2)}), r"\[2, 2\], the config wants \[2, 640\]"),
        (lambda w: w.update({"quantizer.proj.weight": "text"}), "'quantizer.proj.weight' is a str"),
        (lambda w: w.update({"quantizer.proj.weight": torch.zeros(2, 640).to_sparse()}), "without plain numbers"),
        (lambda w: w.update({"quantizer.proj.weight": torch.zeros(2, 640, device="meta")}), "without plain numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant", "ignore:Validating sparse")
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    path = pack(tmp_path / "a.nemo", reference_config(), _changed(change))
    with pytest.raises(CheckpointError, match=message):
        read_nemo(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": {"n_layer": 3}}, "unknown key 'encoder.n_layer'; did you mean"),
        ({"target": "nemo.collections.asr.models.EncDecCTCModelBPE"}, "names '.*EncDecCTCModelBPE'; only .*Denoise"),
        ({"quantizer": {"time_ahead": True}}, "'quantizer.time_ahead' is not supported"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_settings_that_are_not_known_are_listed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = reference_config()
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=f"a.nemo: .*{message}"):
        read_nemo(pack(tmp_path / "a.nemo", config, state_dict()))


class Payload:
    """A pickle that would make a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["nemo", "ckpt", "hyper", "port", "raw"])
def test_no_payload_runs(tmp_path: Path, kind: str) -> None:
    harm, weights = Payload(tmp_path / "harm"), dict(state_dict())
    path = tmp_path / f"a.{kind}"
    if kind == "nemo":
        pack(path, reference_config(), weights | {"x": harm})
    else:
        contents: dict[str, Any] = {
            "ckpt": {"state_dict": weights | {"x": harm}, "hyper_parameters": {"cfg": reference_config()}},
            "hyper": {"state_dict": weights, "hyper_parameters": {"cfg": harm}},
            "port": {"model_state_dict": weights, "config": harm},
            "raw": harm,
        }
        torch.save(contents[kind], path)
    with pytest.raises(CheckpointError, match="names posix.mkdir, which could run code"):
        read_any(path)
    assert not (tmp_path / "harm").exists()


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    "config, message",
    [
        (BOMB, "aliases grow beyond"),
        ("x: !!python/object/apply:os.system [true]", "tag .* is not allowed"),
        ("[" * 100, "nested deeper"),
        ("a: 1\na: 2", "stands twice"),
        ("- 1", "holds a list"),
        ("", "holds a NoneType"),
        ("x" * 1_000_001, "1000001 bytes; a configuration has at most"),
        ("a: ${b}\nb: ${a}", "cycle"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_harmful_configs(tmp_path: Path, config: str, message: str) -> None:
    path = pack(tmp_path / "a.nemo", "", {}, **{"model_config.yaml": config.encode("utf-8", "surrogateescape")})
    with pytest.raises(CheckpointError, match=message):
        read_nemo(path)


def _member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "member, message",
    [
        (_member("../model_config.yaml"), "points outside"),
        (_member("/etc/passwd"), "points outside"),
        (_member("a/../../b"), "points outside"),
        (_member("model_config.yaml", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a symbolic link"),
        (_member("model_weights.ckpt", type=tarfile.LNKTYPE, linkname="x"), "is a hard link"),
        (_member("x", type=tarfile.CHRTYPE), "is a device"),
        (_member("x", type=tarfile.FIFOTYPE), "is a pipe"),
        (_member("./model_config.yaml"), "comes twice"),
    ],
)
def test_harmful_members(tmp_path: Path, member: tarfile.TarInfo, message: str) -> None:
    path = pack(tmp_path / "a.nemo", reference_config(), state_dict(), prefix="")
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    with pytest.raises(CheckpointError, match=message):
        read_nemo(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        archive.addfile(tarfile.TarInfo("./other.txt"))
    with pytest.raises(CheckpointError, match=r"has no 'model_config.yaml', only other.txt"):
        read_nemo(tmp_path / "a.nemo")
    with pytest.raises(CheckpointError, match="b.nemo: cannot be read: No such file"):
        read_any(tmp_path / "b.nemo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: holds no checkpoint"):
        read_any(tmp_path / "empty")


def test_a_gzip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nest_fn.interop.nemo_archive._MIN_LIMIT", 1 << 20)
    (tmp_path / "a.nemo").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(CheckpointError, match="unpacks to more than 1048576 bytes"):
        read_nemo(tmp_path / "a.nemo")


def refused(path: Path) -> str | Any:
    """The message with which ``read_any`` refuses, or what it reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_any(path)
        except CheckpointError as error:
            return str(error)


def _stored(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if not path.exists():
        if name.endswith(".nemo"):
            pack(path, reference_config(), state_dict(), "w:gz" if "gz" in name else "w")
        else:
            torch.save({"state_dict": state_dict(), "hyper_parameters": {"cfg": reference_config()}}, path)
    return path


@pytest.mark.parametrize("name", ["a.nemo", "gz.nemo", "a.ckpt"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_short_anywhere(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = _stored(tmp_path, name)
    content = path.read_bytes()
    padding = 10240 if name == "a.nemo" else 0  # zeros that follow the end mark of an archive
    cut = data.draw(st.integers(0, len(content) - 1 - padding))
    path.write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=name):
        read_any(path)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.nemo", "gz.nemo", "a.ckpt"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_are_seen_or_harmless(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """PyTorch does not compare the CRC of its records; we do, so that no tensor changes unseen."""
    path = _stored(tmp_path, name)
    content = bytearray(path.read_bytes())
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    back = refused(path)
    path.write_bytes(content)
    if isinstance(back, str):
        assert name in back
    else:
        assert same(list(back[:2]), list(model()[:2]))


def test_flipped_bit_in_a_tensor_is_named(tmp_path: Path) -> None:
    path = _stored(tmp_path, "a.nemo")
    content = bytearray(path.read_bytes())
    needle = state_dict()["decoder.decoder_layers.0.weight"].numpy().tobytes()
    content[content.index(needle) + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model_weights.ckpt: is damaged.*CRC-32"):
        read_nemo(path)


# Lightning's files and those of the port.


def test_lightning_with_plain_settings(tmp_path: Path) -> None:
    ours = model()
    for settings_of in (lambda config: {"cfg": config}, lambda config: config):
        content = {"state_dict": state_dict(), "hyper_parameters": settings_of(reference_config()), "epoch": 3}
        torch.save(content, tmp_path / "a.ckpt")
        params, _, cfg = read_any(tmp_path / "a.ckpt")
        assert same(params, ours[0])
        assert cfg.encoder.n_layers == 1
    torch.save({"state_dict": state_dict()}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="no config among its 'hyper_parameters'; take the .nemo file"):
        read_any(tmp_path / "b.ckpt")


def _omega(value: Any) -> Any:
    """What the pickle of an OmegaConf object looks like, without OmegaConf: nodes with their content inside."""
    from nest_fn.interop import lightning

    node = object.__new__(lightning._Branch if isinstance(value, dict | list) else lightning._Leaf)
    if isinstance(value, dict):
        node.__dict__["_content"] = {name: _omega(child) for name, child in value.items()}
    elif isinstance(value, list):
        node.__dict__["_content"] = [_omega(child) for child in value]
    else:
        node.__dict__["_val"] = value
    return node


def test_settings_inside_omegaconf_nodes() -> None:
    from nest_fn.interop.lightning import to_plain

    config = reference_config()
    assert to_plain(_omega({"cfg": config}), "test") == {"cfg": config}
    assert to_plain({"a": torch.float32, "b": (1, None)}, "test") == {"a": "???", "b": [1, None]}
    loop: dict[str, Any] = {}
    loop["a"] = loop
    with pytest.raises(CheckpointError, match="beyond 100000 nodes or 64 levels"):
        to_plain(loop, "test")
    wide: Any = [1]
    for _ in range(20):
        wide = [wide, wide, wide]
    with pytest.raises(CheckpointError, match="beyond"):
        to_plain(wide, "test")


@pytest.mark.parametrize("nested", [True, False])
def test_files_of_the_port(tmp_path: Path, nested: bool) -> None:
    keywords = {
        "n_layers": 1,
        "d_model": 8,
        "n_heads": 2,
        "subsampling_conv_channels": 2,
        "num_classes": 8,
        "code_dim": 2,
    }
    config: Mapping[str, Any] = Config.preset("tiny", SMALL).to_dict() if nested else keywords | {"dropout": 0.2}
    content = {"model_state_dict": state_dict(), "config": config, "epoch": 2, "step": 30, "optimizer_state_dict": {}}
    torch.save(content, tmp_path / "a.pt")
    params, state, cfg = read_any(tmp_path / "a.pt")
    assert same(params, model()[0])
    assert same(state, model()[1])
    if not nested:
        assert (cfg.encoder.dropout_att, cfg.encoder.dropout_emb, cfg.preprocessor.dither) == (0.2, 0.0, 0.0)
    ours = flatten(params) | flatten(state)
    torch.save({"model_state_dict": ours, "config": config}, tmp_path / "b.pt")  # under our own names
    assert same(read_any(tmp_path / "b.pt")[0], params)
    wrapped = {f"module._orig_mod.{name}": leaf for name, leaf in ours.items()}  # compiled, on many devices
    torch.save({"model_state_dict": wrapped, "config": config}, tmp_path / "w.pt")
    assert same(read_any(tmp_path / "w.pt")[0], params)
    torch.save({"model_state_dict": ours, "config": {"n_layer": 1}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="unknown key 'n_layer'; did you mean 'n_layers'"):
        read_any(tmp_path / "c.pt")
    torch.save(state_dict(), tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="d.pt: holds .*a model with its config is wanted"):
        read_any(tmp_path / "d.pt")


def test_the_ports_defaults_are_large() -> None:
    cfg = config_from_keywords({})
    assert cfg.encoder == Config().encoder
    assert cfg.preprocessor.dither == 0


def test_convert_through_every_kind(tmp_path: Path) -> None:
    params, state, cfg = model("num_books=2")
    checkpoint.save(tmp_path / "start", params, state, cfg)
    names = ["a.nemo", "b.pt", "c", "d.nemo"]
    for source, target in zip(["start", *names], names, strict=False):
        assert convert(tmp_path / source, tmp_path / target) == cfg
    back = read_any(tmp_path / "d.nemo")
    assert same(params, back[0])
    assert same(state, back[1])
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "d.nemo").read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot be written as '.ckpt'; choose .nemo"):
        convert(tmp_path / "start", tmp_path / "e.ckpt")
    (tmp_path / "f").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="neither a .nemo archive"):
        read_any(tmp_path / "f")


def test_the_newest_whole_checkpoint_of_a_run(tmp_path: Path) -> None:
    params, state, cfg = model()
    for step in (1, 2):
        trees = {"params": params, "state": state}
        checkpoint.write_checkpoint(
            checkpoint.step_path(tmp_path / "checkpoints", step), trees, cfg.to_dict(), {"step": step}
        )
    (tmp_path / "checkpoints" / "step_00000002" / "meta.json").write_text("{")
    with pytest.warns(UserWarning, match="step_00000002/meta.json: is damaged.* The one before it is taken"):
        assert same(read_any(tmp_path)[0], params)


def test_a_restored_model_computes_the_same(tmp_path: Path) -> None:
    params, state, cfg = model()
    checkpoint.save(tmp_path / "a", params, state, cfg)
    convert(tmp_path / "a", tmp_path / "a.nemo")
    audio = torch.linspace(-0.5, 0.5, 32000).reshape(2, 16000).sin()
    batch = {"audio": audio, "audio_len": torch.tensor([16000, 9000]), "noisy_audio": audio,
             "noisy_audio_len": torch.tensor([16000, 9000])}  # fmt: skip
    before, _ = forward(params, state, batch, cfg, apply_mask=False)
    params, state, cfg = read_any(tmp_path / "a.nemo")
    after, _ = forward(params, state, batch, cfg, apply_mask=False)
    assert torch.equal(before.log_probs, after.log_probs)
    assert torch.equal(before.tokens, after.tokens)
