"""Checkpoint folders: lazy reading, atomic writing, hashes, conversion, original files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_kernel import (
    FORMATS,
    WEIGHT_TYPES,
    CheckpointError,
    CheckpointWriter,
    ConfigError,
    Scheme,
    convert,
    open_checkpoint,
    read_manifest,
    verify_tensors,
)
from marlin_kernel.checkpoint import (
    MANIFEST,
    packed_scheme,
    read_layer,
    read_original,
    read_probe,
    source_hash,
    tensor_hash,
)
from marlin_kernel.formats import write
from tests.cases import random_layer, same_layer

U4B8 = WEIGHT_TYPES["uint4b8"]
ROOT = Path(__file__).parent.parent
SCHEME = Scheme("marlin", U4B8, 32)
NAMES = ("model.a.q_proj", "model.a.down_proj", "model.b.q_proj")


def write_folder(out: Path, scheme: Scheme = SCHEME, seed: int = 0, **options) -> dict:
    """A packed folder of three layers and a norm. Returns the layers."""
    torch.manual_seed(seed)
    act_order = scheme.act_order
    layers = {
        name: random_layer(96, 64, scheme.weight_type, 32, act_order=act_order, bias=i == 0)
        for i, name in enumerate(NAMES)
    }
    with CheckpointWriter(out, scheme, **options) as writer:
        writer.add("model.norm.weight", torch.full((96,), float(seed)))
        for name, layer in layers.items():
            writer.add_layer(name, layer)
        writer.add_file("tokenizer.json", b"{}")
        writer.add_file("notes/readme.txt", Path(__file__))
        writer.add_probe(torch.tensor([1, 2]), torch.randn(2, 5))
        writer.finish({"model_type": "x"}, source={"sha256": "ab"}, settings={"seed": seed})
    return layers


@pytest.mark.parametrize("shard", [1 << 30, 3000])
def test_written_folder_reads_back(tmp_path, shard):
    layers = write_folder(tmp_path / "out", max_shard_bytes=shard)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert ("model.safetensors" in files) == (shard > 3000)
    assert ("model.safetensors.index.json" in files) == (shard == 3000)
    checkpoint = open_checkpoint(tmp_path / "out")
    scheme = packed_scheme(checkpoint)
    assert scheme.modules == {name: (96, 64) for name in NAMES}
    for name, layer in layers.items():
        assert same_layer(read_layer(checkpoint, scheme, name), layer)
    assert checkpoint.shape("model.a.q_proj.B") == (8, 128)
    assert checkpoint.shapes().keys() == set(checkpoint)
    assert not checkpoint["model.norm.weight"].any()
    assert verify_tensors(tmp_path / "out") == []
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # no temporary folder left
    if shard == 3000:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        sizes = [t.numel() * t.element_size() for t in map(checkpoint.__getitem__, checkpoint)]
        assert index["metadata"]["total_size"] == sum(sizes)
        for file in set(index["weight_map"].values()):
            tensors = load_file(tmp_path / "out" / file)
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            assert len(tensors) == 1 or total <= shard


def test_manifest_holds_what_a_reader_needs(tmp_path):
    write_folder(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    expected = {"format": "marlin", "weight_type": "uint4b8", "group_size": 32}
    assert manifest.items() >= expected.items()
    assert manifest["layers"]["model.a.q_proj"] == {
        "k": 96,
        "n": 64,
        "k_padded": 128,
        "n_padded": 64,
        "group_size": 32,
        "act_order": False,
        "bias": True,
    }
    assert manifest["source"] == {"sha256": "ab"} and manifest["settings"] == {"seed": 0}
    assert manifest["tensors"].keys() == set(open_checkpoint(tmp_path / "out"))
    token_ids, logits = read_probe(tmp_path / "out")
    assert token_ids.tolist() == [1, 2] and logits.shape == (2, 5)


def test_servers_do_not_mistake_the_probe_for_weights(tmp_path):
    write_folder(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_verify_names_the_tensors_that_differ(tmp_path):
    write_folder(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors["model.a.q_proj.B"][3, 7] ^= 1
    tensors["model.b.q_proj.s"] = tensors["model.b.q_proj.s"].view(-1)
    tensors["added"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert verify_tensors(tmp_path / "out") == [
        "added",
        "model.a.q_proj.B",
        "model.b.q_proj.s",
        "model.norm.weight",
    ]


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    weight = torch.arange(12.0)
    with CheckpointWriter(tmp_path / "out", SCHEME) as writer:
        writer.add("a", weight)
        writer.add("b", weight)
        writer.add("c", weight[4:8])
        writer.add("empty", torch.zeros(0))
        writer.add("nothing", torch.zeros(0))
        writer.finish({})
    checkpoint = open_checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint["b"], weight) and torch.equal(checkpoint["c"], weight[4:8])
    assert verify_tensors(tmp_path / "out") == []


def test_tensor_hash_depends_on_dtype_shape_and_values():
    x = torch.arange(6, dtype=torch.int32)
    hashes = {tensor_hash(t) for t in (x, x.view(2, 3), x.view(torch.float32), x + 1)}
    assert len(hashes) == 4
    assert tensor_hash(x.view(2, 3).T.contiguous().T) == tensor_hash(x.view(2, 3))
    assert tensor_hash(torch.zeros(0)) != tensor_hash(torch.tensor(0.0))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["uint4b8", "uint8"])
def test_convert_changes_no_value(tmp_path, name, act_order):
    scheme = Scheme("marlin", WEIGHT_TYPES[name], 32, act_order)
    layers = write_folder(tmp_path / "marlin", scheme)
    formats = [fmt for fmt in FORMATS if not (act_order and fmt == "compressed-tensors")]
    for fmt in formats:
        convert(tmp_path / "marlin", tmp_path / f"to {fmt}", fmt)
        convert(tmp_path / f"to {fmt}", tmp_path / f"back from {fmt}", "marlin")
        for folder in (f"to {fmt}", f"back from {fmt}"):
            checkpoint = open_checkpoint(tmp_path / folder)
            scheme = packed_scheme(checkpoint)
            for layer_name, layer in layers.items():
                assert same_layer(read_layer(checkpoint, scheme, layer_name), layer)
            assert verify_tensors(tmp_path / folder) == []
            assert (tmp_path / folder / "tokenizer.json").read_bytes() == b"{}"
            assert read_probe(tmp_path / folder)[0].tolist() == [1, 2]
        original = load_file(tmp_path / "marlin/model.safetensors")
        back = load_file(tmp_path / f"back from {fmt}/model.safetensors")
        assert original.keys() == back.keys()
        assert all(torch.equal(original[n], back[n]) for n in original)
    if "gptq" in formats:
        quantize_config = json.loads((tmp_path / "to gptq/quantize_config.json").read_text())
        config = json.loads((tmp_path / "to gptq/config.json").read_text())
        assert config["quantization_config"] == quantize_config


def test_convert_refuses_before_it_writes(tmp_path):
    write_folder(tmp_path / "marlin", Scheme("marlin", U4B8, 32, True))
    with pytest.raises(ConfigError, match="compressed-tensors readers no longer accept"):
        convert(tmp_path / "marlin", tmp_path / "out", "compressed-tensors")
    assert [p.name for p in tmp_path.iterdir()] == ["marlin"]


# ---- refusals ------------------------------------------------------------------------------------


def test_existing_folders_are_protected(tmp_path):
    out = tmp_path / "out"
    write_folder(out)
    with pytest.raises(ConfigError, match="already holds a checkpoint; pass --overwrite"):
        write_folder(out)
    write_folder(out, seed=1, overwrite=True)
    assert read_manifest(out)["settings"] == {"seed": 1}
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no checkpoint of this tool"):
            write_folder(foreign, overwrite=overwrite)
    assert (foreign / "chapter.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty")
    assert verify_tensors(tmp_path / "empty") == []


def test_a_folder_that_appears_meanwhile_is_protected(tmp_path):
    with CheckpointWriter(tmp_path / "out", SCHEME) as writer:
        writer.add("a", torch.zeros(1))
        write_folder(tmp_path / "out", seed=5)  # another run was faster
        with pytest.raises(ConfigError, match="already holds a checkpoint"):
            writer.finish({})
    assert read_manifest(tmp_path / "out")["settings"] == {"seed": 5}


def test_writer_rejects_layers_of_another_grid(tmp_path):
    with CheckpointWriter(tmp_path / "out", SCHEME) as writer:
        with pytest.raises(ConfigError, match="layer x is"):
            writer.add_layer("x", random_layer(128, 64, U4B8, 64))
        with pytest.raises(ConfigError, match="layer x is"):
            writer.add_layer("x", random_layer(128, 64, U4B8, 32, act_order=True))
        writer.add("y", torch.zeros(2))
        with pytest.raises(CheckpointError, match="y was added twice"):
            writer.add("y", torch.zeros(2))
    assert not list(tmp_path.iterdir())  # not finished: nothing stays
    with CheckpointWriter(tmp_path / "out", Scheme("gptq", U4B8, 128)) as writer:
        with pytest.raises(ConfigError, match="larger than the 96 inputs of x"):
            writer.add_layer("x", random_layer(96, 64, U4B8, 128))


def test_unreadable_folders(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights only; convert them to safetensors"):
        open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        read_manifest(folder)
    with pytest.raises(CheckpointError, match="config.json is missing"):
        write_folder(tmp_path / "out")
        (tmp_path / "out/config.json").unlink()
        packed_scheme(open_checkpoint(tmp_path / "out"))


def test_incomplete_shards_are_noticed(tmp_path):
    write_folder(tmp_path / "out", max_shard_bytes=3000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match="which lacks it"):
        open_checkpoint(tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="is missing; the checkpoint is incomplete"):
        open_checkpoint(tmp_path / "out")


def test_plain_folder_is_no_packed_one(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no quantization_config"):
        packed_scheme(open_checkpoint(tmp_path))


def test_source_hash_sees_every_byte(tmp_path):
    write_folder(tmp_path / "a", max_shard_bytes=3000)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert source_hash(tmp_path / "a") == source_hash(tmp_path / "b")
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert source_hash(tmp_path / "a") != source_hash(tmp_path / "b")
    assert source_hash(shard) != source_hash(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint to hash"):
        source_hash(tmp_path / "c")


# ---- a run that is killed ------------------------------------------------------------------------

# Forks once per step, from a process that has one thread; the child dies at that step.
KILLED = """
    import json, os, sys
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    import marlin_kernel.checkpoint as checkpoint
    from tests.test_marlin_checkpoint import write_folder

    out, existing = Path(sys.argv[2]), bool(int(sys.argv[3]))

    def run(step):
        left = [step]

        def dying(function):
            def wrapper(*args, **kwargs):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*args, **kwargs)
            return wrapper

        os.fsync, os.rename = dying(os.fsync), dying(os.rename)
        for name in ("save_file", "_exchange", "_remove_abandoned"):
            setattr(checkpoint, name, dying(getattr(checkpoint, name)))
        checkpoint.shutil.rmtree = dying(checkpoint.shutil.rmtree)
        write_folder(out, seed=1, overwrite=True, max_shard_bytes=3000)
        os._exit(0)

    for step in range(100):
        checkpoint.shutil.rmtree(out, ignore_errors=True)
        if existing:
            write_folder(out, seed=0)
        pid = os.fork()
        if pid == 0:
            run(step)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seed = None
        if out.exists():
            seed = checkpoint.read_manifest(out)["settings"]["seed"]
            assert checkpoint.verify_tensors(out) == []
        for left in out.parent.glob(".out.partial-*"):
            complete = (left / checkpoint.MANIFEST).exists()
            assert complete or not (left / "model.safetensors").exists()
        print(json.dumps([code, seed]))
        if code == 0:
            break
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_run_leaves_the_old_checkpoint_or_the_new_one(tmp_path, existing):
    """At any step that touches the disk, OUT is absent, or old and whole, or new and whole."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), ROOT, out, str(int(existing))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in result.stdout.splitlines()]
    codes, seeds = zip(*steps, strict=True)
    assert codes == (9,) * (len(codes) - 1) + (0,) and len(codes) > 12
    before = 0 if existing else None
    new = seeds.index(1)
    assert seeds == (before,) * new + (1,) * (len(seeds) - new)
    assert not list(tmp_path.glob(".out.partial-*"))  # later runs removed what was left


# ---- files of the original repository ------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 128])
def test_original_state_dicts_are_read(tmp_path, group_size):
    layer = random_layer(256, 256, U4B8, group_size)
    state = {f"model.q_proj.{suffix}": t for suffix, t in write(layer, "marlin").items()}
    state["model.q_proj.workspace"] = torch.zeros(32, dtype=torch.int32)
    state["model.norm.weight"] = torch.ones(4)
    torch.save(state, tmp_path / "model.marlin")
    layers, others = read_original(tmp_path / "model.marlin")
    assert same_layer(layers["model.q_proj"], layer)
    assert list(others) == ["model.norm.weight"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_original_reader_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x.B": Evil()}, tmp_path / "evil.marlin")
    with pytest.raises(CheckpointError, match="not a state dict of plain tensors"):
        read_original(tmp_path / "evil.marlin")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x.weight": torch.zeros(2)}, "holds no Marlin layer"),
        ({"x.B": torch.zeros(4, 128, dtype=torch.int32)}, "do not belong together"),
        ([1], "not a state dict"),
    ],
)
def test_original_reader_rejects(tmp_path, state, message):
    torch.save(state, tmp_path / "x.marlin")
    with pytest.raises(CheckpointError, match=message):
        read_original(tmp_path / "x.marlin")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_original(tmp_path / "y.marlin")
