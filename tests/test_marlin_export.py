"""Re-export of packed folders and import of original state dicts, by command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from marlin_kernel import export, reference
from marlin_kernel.checkpoint import verify_tensors
from marlin_kernel.formats import QuantizedLinear, write
from marlin_kernel.hf import load_model
from marlin_kernel.weight_types import WEIGHT_TYPES, weight_type
from tests.cases import tiny_model, write_packed

U4 = weight_type("uint4b8")


@pytest.fixture
def original(tmp_path: Path):
    """A plain model folder, its original-style state dict file, and the fake-quantized model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(tmp_path / "plain")
    state = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        codes, scales, _ = reference.quantize(module.weight.T, U4, 128)
        layer = QuantizedLinear.of(codes, scales, U4, 128)
        module.weight.data = layer.dequantize(torch.float16).T.contiguous()
        state |= {f"{name}.{key}": tensor for key, tensor in write(layer, "marlin").items()}
        state[f"{name}.workspace"] = torch.zeros(8, dtype=torch.int32)
    plain = model.state_dict()
    state |= {key: t for key, t in plain.items() if f"{key[:-7]}.B" not in state}
    torch.save(state, tmp_path / "model.marlin.g128")
    return tmp_path, model


@pytest.mark.parametrize("fmt", ["marlin", "gptq"])
def test_original_state_dict_becomes_a_folder(original, fmt: str) -> None:
    folder, model = original
    out = folder / "out"
    args = [str(folder / "model.marlin.g128"), str(out), "--model", str(folder / "plain")]
    assert export.main([*args, "--format", fmt]) == 0
    assert verify_tensors(out) == []
    ids = torch.arange(20)[None]
    expected = model.float()(ids).logits
    assert torch.allclose(load_model(out)(ids).logits, expected, atol=2e-3)


def test_folder_to_folder_keeps_every_value(original) -> None:
    folder, _ = original
    args = [str(folder / "model.marlin.g128"), str(folder / "a"), "--model", str(folder / "plain")]
    assert export.main(args) == 0
    assert export.main([str(folder / "a"), str(folder / "b"), "--format", "gptq"]) == 0
    assert export.main([str(folder / "b"), str(folder / "c"), "--format", "marlin"]) == 0
    first, last = load_model(folder / "a").state_dict(), load_model(folder / "c").state_dict()
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_errors_name_the_way_out(original, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = original
    file = str(folder / "model.marlin.g128")
    assert export.main([file, str(folder / "o")]) == 2
    assert "--model FOLDER" in capsys.readouterr().err
    assert export.main([file, str(folder / "o"), "--model", str(folder)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert export.main([str(folder / "plain"), str(folder / "o")]) == 2
    assert "error:" in capsys.readouterr().err
    assert export.main([str(folder / "absent"), str(folder / "o")]) == 2
    assert "absent does not exist" in capsys.readouterr().err
    plain = str(folder / "plain")
    assert export.main([file, str(Path(file) / "o"), "--model", plain]) == 2  # below a file
    assert "error: [Errno" in capsys.readouterr().err
    torch.save({"x": folder}, folder / "pickled")
    assert export.main([str(folder / "pickled"), str(folder / "o"), "--model", plain]) == 2
    error = capsys.readouterr().err
    assert "is not a state dict of plain tensors" in error and "weights_only" not in error


def test_zero_points_of_any_value_become_gptq(tmp_path: Path) -> None:
    """Version 1 cannot hold a zero point of 0, so zero points are stored as in version 2."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.abs_()  # grids that begin at zero
    write_packed(model, tmp_path / "a", wtype=WEIGHT_TYPES["uint4"])
    state = load_model(tmp_path / "a").state_dict()
    for out, fmt in (("b", "gptq"), ("c", "marlin")):
        source = tmp_path / ("a" if fmt == "gptq" else "b")
        assert export.main([str(source), str(tmp_path / out), "--format", fmt]) == 0
    assert '"gptq_v2"' in (tmp_path / "b/config.json").read_text()
    back = load_model(tmp_path / "c").state_dict()
    assert all(torch.equal(state[name], back[name]) for name in state)
