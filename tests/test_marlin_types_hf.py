"""Checkpoints of types that are not integers, and of AWQ, become models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, hf
from marlin_kernel.packing import pack_awq
from tests.cases import tiny_model, write_packed

OTHER_TYPES = [t for t in WEIGHT_TYPES.values() if t.name not in INTEGER_TYPES]


@pytest.mark.parametrize("wtype", OTHER_TYPES, ids=lambda t: t.name)
def test_our_checkpoints(wtype, tmp_path):
    model = tiny_model()
    group_size = wtype.group_sizes[0]
    token_ids, logits = write_packed(model, tmp_path / "out", wtype=wtype, group_size=group_size)
    loaded = hf.load_model(tmp_path / "out", dtype=torch.float32, verify=True)
    torch.testing.assert_close(hf.probe_logits(loaded, token_ids), logits, rtol=1e-3, atol=1e-3)


def test_awq_checkpoints(tmp_path):
    """An AWQ folder made from one of ours: the same codes in its packing."""
    model = tiny_model()
    source, out = tmp_path / "ours", tmp_path / "awq"
    wtype = WEIGHT_TYPES["uint4"]
    token_ids, logits = write_packed(model, source, wtype=wtype, group_size=32)
    config = json.loads((source / "config.json").read_text())
    names = list(config["quantization_config"]["modules"])
    tensors = {
        name: t
        for name, t in load_file(source / "model.safetensors").items()
        if name.rpartition(".")[0] not in names
    }
    ours = hf.load_model(source, dtype=torch.float32)
    for name in names:
        layer = ours.get_submodule(name).quantized()
        tensors[f"{name}.qweight"] = pack_awq(layer.codes)
        tensors[f"{name}.qzeros"] = pack_awq(layer.zeros)
        tensors[f"{name}.scales"] = layer.scales
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    loaded = hf.load_model(out, dtype=torch.float32)
    torch.testing.assert_close(hf.probe_logits(loaded, token_ids), logits, rtol=1e-3, atol=1e-3)
