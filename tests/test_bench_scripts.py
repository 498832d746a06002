"""Benchmark scripts without a GPU: options, tables, plots, and generation with a tiny model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call, create_autospec

import pytest
import torch

from marlin_kernel import kernel_configs
from marlin_kernel.kernel_configs import GemmConfig
from scripts import command_line, tuned_tables

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


CSV = """kernel,dtype,group_size,K,N,M,us_median_of_passes
slow,w4a16,128,4096,4096,1,9.5
fast,w4a16-bf16,128,4096,4096,1,6.75
fast,w4a16,-1,4096,4096,1,6.0
eight bits,w8a16-int8,128,4096,4096,1,1.0
cublas-fp16,fp16,0,4096,4096,1,13.0
"""


def row(m=1, us=5.0, **changes) -> dict:
    made = {"k": 4096, "n": 4096, "m": m, "dtype": "float16", "group_size": 128, "us": us}
    made |= {"us_alone": 6.0, "floor": 4.0, "floor_pdl": 3.0, "cublas": 10.0, "tflops": 1.0}
    return made | {"gb_per_s": 1.0, "error": 1e-4, "config": "DecodeConfig()"} | changes


def test_best_peer_of_each_entry(script, tmp_path, capsys):
    tables = script("bench_tables")
    file = tmp_path / "peers.csv"
    file.write_text(CSV)
    peers = tables.read_peers(file)
    assert peers == {(128, 4096, 4096, 1): ("fast", 6.75), (-1, 4096, 4096, 1): ("fast", 6.0)}
    rows = [row(), row(us=3.0), row(m=2)]
    tables.add_peers(rows, peers)
    assert [r.get("us_peer") for r in rows] == [6.75, 6.75, None]
    tables.print_row(rows[0])
    assert "fast 6.75 (1.35x)" in capsys.readouterr().out
    file.write_text("kernel,K,N,M,us\n")
    with pytest.raises(SystemExit, match="expected kernel, dtype, group_size, K, N, M and micro"):
        tables.read_peers(file)


def test_summary_holds_geometric_means_and_the_worst(script, capsys):
    tables = script("bench_tables")
    rows = [row(us=4.0, us_peer=8.0), row(us=8.0, us_invariant=16.0, cublas=math.nan), row(m=2)]
    first, second = tables.summarize(rows)
    assert first["x floor"] == pytest.approx(math.sqrt(2)) and first["worst x floor"] == 2
    assert first["x cublas"] == pytest.approx(2.5)  # nan: not measured
    assert (first["x peer"], first["invariant"]) == (pytest.approx(2), pytest.approx(2))
    assert "x peer" not in second and second["m"] == 2
    assert "x peer" in capsys.readouterr().out


def test_models_are_summed_over_their_linears(script, capsys):
    tables = script("bench_tables")
    tables.print_models({"Toy": ["4096x4096", "4096x4096"]}, [row(us=5.0)])
    assert "Toy float16 group 128 M=1: 10.0 us a layer, 2.00x" in capsys.readouterr().out


MADE_WITH_A_PARSER = {
    path.stem for path in SCRIPTS.glob("*.py") if "make_parser(" in path.read_text()
}
NEED_A_GPU = {
    "bench": [],
    "bench_generate": [],
    "bench_sparse": [],
    "bench_types": [],
    "bench_w4a8": [],
    "benchmark_marlin": [],
    "sparse_benchmarks": ["--dtype", "int8", "model_bench"],
    "tune": [],
    "tune_scaled": [],
    "tune_sparse": [],
    "tune_w4a8": [],
}


def every_parser(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its modes."""
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("name", sorted(MADE_WITH_A_PARSER - {"command_line"}))
def test_help_explains_every_option_and_default(name, script, monkeypatch):
    """As does the script's docstring, which shows how it is called."""
    seen = []

    def parse(parser, *arguments) -> None:
        seen.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(SystemExit):
        script(name).main()
    shown = seen[0].format_help()
    assert f"python scripts/{name}.py" in shown and str(SCRIPTS.parent) not in shown
    for parser in every_parser(seen[0]):
        for action in parser._actions:
            text = parser._get_formatter()._expand_help(action) if action.help else None
            assert text, f"{name}: {action.dest} has no help"
            assert "default:" in text or action.default in (None, False, math.inf, "==SUPPRESS==")


@pytest.mark.parametrize("name", NEED_A_GPU)
def test_without_a_gpu_one_sentence_says_so(name, script, monkeypatch):
    module = script(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, *NEED_A_GPU[name]])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    sentence = rf"scripts/{name}\.py times kernels on a CUDA GPU, and torch finds none(; .*)?"
    assert re.fullmatch(sentence, str(stopped.value))


def test_other_gpus_are_told_where_to_go(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    command_line.require_gpu("scripts/x.py")
    with pytest.raises(SystemExit, match=r"for compute capability 9\.0, and this GPU has 8\.6; "):
        command_line.require_gpu("scripts/x.py", capability=(9, 0))


def test_shapes_and_numbers_that_are_none():
    assert command_line.shape("4096x12288") == (4096, 12288)
    for text in ("4096", "4096x", "axb", "1x2x3", "-1x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no K x N such as 4096x12288"):
            command_line.shape(text)
    assert command_line.positive("16") == 16
    for text in ("0", "-1", "1.5", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no whole number of at least 1"):
            command_line.positive(text)


def test_the_command_to_note_holds_no_folders_of_this_machine(monkeypatch):
    words = "/home/me/model.gguf --c4 data/c4.txt --text code=/home/me/code --only".split()
    monkeypatch.setattr(sys, "argv", ["x", *words, "fast;best"])
    assert command_line.command("scripts/x.py") == (
        "python scripts/x.py model.gguf --c4 data/c4.txt --text code=code --only 'fast;best'"
    )


def test_results_make_their_folders(tmp_path):
    command_line.write_json(tmp_path / "new" / "folder" / "x.json", {"a": [1]})
    assert json.loads((tmp_path / "new" / "folder" / "x.json").read_text()) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("uint4b8", "expected weight type-activation-group size, such as"),
        ("uint5-int8-0", "expected weight type-activation-group size, such as"),
        ("uint4b8-int8-48", "group_size=48 is not in"),
        ("nvfp4-int8-16", "nvfp4 is not multiplied with int8 activations"),
        ("uint4b8-float16-128", "activation='float16' is not one of int8, float8_e4m3fn"),
    ],
)
def test_pairs_of_8_bit_activations_that_do_not_exist(text, rule, script):
    with pytest.raises(argparse.ArgumentTypeError, match=rule):
        script("tune_w4a8").parse_types(text)
    assert script("tune_w4a8").parse_types("uint4b8-int8-0").group_size == 0


def test_tuned_tables_say_how_they_were_made(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--m", "1"])
    options = argparse.Namespace(type="uint4b8", dtype="float16", group_size=128)
    choice = {"m": 1, "us": 2.0, "kind": "decode", "config": {}}
    file = tmp_path / "table.json"
    script("tune").write(file, "A GPU", options, {(64, 128): {1: choice}})
    table = json.loads(file.read_text())
    assert table["command"] == "python scripts/tune.py --m 1"
    assert table["rows"] == [{"k": 64, "n": 128, "choices": [choice]}]
    tuned_tables.write_rows(file, "gpu", "scripts/tune_w4a8.py", {(1,): {"types": "a", "us": 2.0}})
    table = json.loads(file.read_text())
    assert table["command"] == "python scripts/tune_w4a8.py --m 1"
    assert table["rows"] == [{"types": "a", "us": 2.0}]
    config = next(c for c in kernel_configs.supported_configs() if c.fits(2, 4, 128))
    ways = [
        {"k": 64, "n": 128, "m": 1, "ways": {"front": 2.0, "other": 3.0}},
        {"k": 64, "n": 128, "m": 2, "ways": {"front": 3.0, str(config): 2.0}},
        {"k": 64, "n": 128, "m": 4, "ways": {"front": 2.01, str(config): 2.0}},
        {"k": 64, "n": 128, "m": 8, "ways": {"front": 2.0}},
    ]
    script("bench_types").write_table(file, ways)
    table = json.loads(file.read_text())
    assert table["command"] == "python scripts/bench_types.py --m 1"
    other = {"m": 2, "us": 2.0, "kind": "decode", "config": dataclasses.asdict(config)}
    front = {"kind": None, "config": None}
    choices = [{"m": 1, "us": 2.0} | front, other, {"m": 4, "us": 2.01} | front]
    assert table["rows"] == [{"k": 64, "n": 128, "choices": choices}]


@pytest.mark.parametrize(
    ("name", "kind"), [("tune_sparse", ("bits", 4)), ("tune_scaled", ("sparse", True))]
)
def test_tuning_keeps_what_it_does_not_measure(name, kind, script, tmp_path, monkeypatch):
    """And what it has measured, when it is stopped."""
    module, file = script(name), tmp_path / "table.json"
    other = dict([kind], k=9, n=9, m=1, config={}, us=9.0)
    same = other | {"k": 64, "n": 128}
    file.write_text(json.dumps({"gpu": "x", "rows": [other, same]}))
    weights = (torch.ones(4), torch.ones(4), torch.ones(4))
    times = iter([{"best": 2.0, "other": 3.0}])

    def time_configs(*_):
        found = next(times, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    configs = module.sparse_configs if name == "tune_sparse" else module.scaled_configs
    monkeypatch.setattr(configs, "as_row", lambda config: {"name": config})
    for attribute, value in {
        "require_gpu": lambda *_, **__: None,
        "compile_first": list,
        "SHAPES": [(64, 128), (128, 128)],
        "TOKENS": (1,),
        "random_weight": lambda *_: weights,
        "rotating_weights": lambda *_: [weights],
        "ROTATE_BYTES": 1,
        "time_configs": time_configs,
    }.items():
        monkeypatch.setattr(module, attribute, value, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")
    monkeypatch.setattr(sys, "argv", [name, "--output", str(file)])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    rows = json.loads(file.read_text())["rows"]
    assert rows == [other, same | {"config": {"name": "best"}, "us": 2.0}]


def test_types_are_compared_with_reading_their_bytes(script, monkeypatch):
    """bench_types asks bench for the floor in its words."""
    module, anything = script("bench_types"), MagicMock()
    floor = create_autospec(script("bench").read_floor, return_value=1.0)
    yardstick = SimpleNamespace(nbytes=64, copies=3)
    fake(module, monkeypatch, read_floor=floor, TOKENS=(), PASSES=((), ()), layer_of=anything,
         formats=anything, PATHS={"sm90": anything}, copies_of=anything,
         RotatingWeights=SimpleNamespace(make=lambda *_, **__: yardstick))  # fmt: skip
    case = ("uint4b8", "float16", "float16", 128, False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert module.measure(case, 64, 64, "sm90", 0.0) == []
    assert floor.call_args_list == [call(64, 3, True)] * 2  # in every pass


def test_results_of_8_bit_activations_are_stored(script, tmp_path, monkeypatch):
    """With peers and options beside them, shape by shape, few tokens first."""
    module, order = script("bench_w4a8"), []

    def measure(types, held, m, k, n, dense, rest):
        assert rest == 0.25
        order.append((types.activation, m, k, n, dense))
        return {"weight_type": types.weight_type, "activation": types.activation, "group_size": 0,
                "k": k, "n": n, "m": m, "us": 2.0, "x_dense": 1.5}  # fmt: skip

    fake(module, monkeypatch, dense_times=lambda m, k, n, rest: {"int_mm": m},
         rotating_records=lambda *_: [], measure=measure)  # fmt: skip
    peers, output = tmp_path / "peers.csv", tmp_path / "new" / "w4a8.json"
    peers.write_text("kernel,dtype,group_size,K,N,M,us\nother,w4a8-int8,-1,4096,4096,1,3.0\n")
    command = "x --types uint4b8-int8-0 --shapes 4096x4096 64x128 --m 128 1 --rest 0.25 --peers"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(peers), "--output", str(output)])
    module.main()
    sizes = [(m, *shape) for m in (1, 128) for shape in ((4096, 4096), (64, 128))]
    assert order == [("int8", m, k, n, {"int_mm": m}) for m, k, n in sizes]
    stored = json.loads(output.read_text())
    assert stored["rows"][0]["x_peer"] == 1.5 and "x_peer" not in stored["rows"][1]
    assert "uint4b8" in str(stored["circumstances"]["options"]["types"])


def fake(module, monkeypatch, **values) -> None:
    """Let a script run without a GPU: what would touch it is replaced."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for attribute, value in {"require_gpu": lambda *_, **__: None, **values}.items():
        monkeypatch.setattr(module, attribute, value)


def test_w4a16_benchmark_honours_its_options(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    module, asked = script("bench"), []

    def bench_shape(k, n, tokens, dtype, group_size, options):
        asked.append((k, n, tuple(tokens), dtype, group_size))
        return [row(m=m, k=k, n=n, dtype=dtype, group_size=group_size) for m in tokens]

    fake(module, monkeypatch, precompile=lambda *_: None, bench_shape=bench_shape)
    peers, output, plot = (tmp_path / name for name in ("p.csv", "new/b.json", "new/b.svg"))
    peers.write_text(CSV)
    options = "--shapes 4096x4096 64x128 --m 128 1 --group_size 128 -1 --dtype float16 bfloat16"
    files = ["--peers", str(peers), "--output", str(output), "--plot", str(plot)]
    module.main([*options.split(), *files])
    kinds = [(d, g) for d in ("float16", "bfloat16") for g in (128, -1)]
    shapes = [(4096, 4096), (64, 128)]
    assert asked == [(*s, m, *kind) for m in ((1,), (128,)) for kind in kinds for s in shapes]
    stored = json.loads(output.read_text())
    assert [r["us_peer"] for r in stored["rows"] if "us_peer" in r] == [6.75, 6.0] * 2
    assert stored["circumstances"]["options"]["shapes"] == [[4096, 4096], [64, 128]]
    assert "bfloat16, group size -1" in plot.read_text()

    asked.clear()
    module.main(["--config", str(SCRIPTS.parent / "configs" / "bench" / "models.yaml")])
    assert len(asked) == 20 and {tokens for _, _, tokens, _, _ in asked} == {(16,)}
    printed = capsys.readouterr().out
    assert "Llama65B float16 group 128 M=16: 20.0 us a layer, 2.00x of torch.matmul" in printed
    assert "Falcon180B" in printed


def test_tuner_keeps_other_entries(script, tmp_path, monkeypatch, capsys):
    module, file = script("tune"), tmp_path / "new" / "table.json"
    asked = []

    def tune_shape(k, n, options, measurements):
        asked.append((k, n, options.type, options.dtype, options.group_size, options.candidates))
        measurements.append([k, n])
        return [{"m": m, "us": 1.0} for m in options.m]

    fake(module, monkeypatch, tune_shape=tune_shape)
    common = ["tune", "--output", str(file), "--shapes"]
    for words in ("64x128 64x64 --m 1 4", "64x128 --m 4 16 --type nvfp4 --candidates 0"):
        monkeypatch.setattr(sys, "argv", [*common, *words.split()])
        module.main()
    assert asked[0] == (64, 128, "uint4b8", "float16", 128, 40)
    assert asked[-1] == (64, 128, "nvfp4", "float16", 16, 0)
    found = {(r["k"], r["n"]): [c["m"] for c in r["choices"]] for r in
             json.loads(file.read_text())["rows"]}  # fmt: skip
    assert found == {(64, 128): [1, 4, 16], (64, 64): [1, 4]}
    for words, message in (
        ("--type mxfp4 --dtype float16", "--dtype float16: mxfp4 takes bfloat16"),
        ("--group_size 48", "--group_size 48 is not in"),
        ("--m 0", "'0' is no whole number of at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["tune", *words.split()])
        with pytest.raises(SystemExit):
            module.main()
        assert message in capsys.readouterr().err


def test_types_benchmark_honours_its_options(script, tmp_path, monkeypatch):
    module, output = script("bench_types"), tmp_path / "new" / "types.json"
    asked, compiled = [], []

    def measure(case, k, n, path, rest):
        assert rest == 0.5
        asked.append((case[0], k, n, path))
        return [{"weight_type": case[0], "us": 1.0}]

    repacking = [{"what": "repack"}]
    ordered = [{"k": 1, "n": 1, "ways": {"front": 1.0}}]
    matmul, quantized = [], []

    def baseline(k, n, dtype, rest):
        matmul.append(dtype)
        return [{"weight_type": "torch.matmul", "us": 2.0}]

    def quantizing(k, n):
        quantized.append((k, n))
        return [{"weight_type": "quantize_activations", "us": 1.0}]

    fake(module, monkeypatch, measure=measure, baseline=baseline, quantizing=quantizing,
         repacking=lambda: list(repacking), act_order=lambda sizes, rest: list(ordered),
         compile_first=compiled.extend)  # fmt: skip
    words = ["x", "--types", "uint4", "nvfp4", "--paths", "sm90", "sm80", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--shapes", "4096x4096"])
    module.main()
    assert {path for *_, path in asked} == {"sm80", "sm90"}
    assert {name for name, *_ in asked} == {"uint4", "nvfp4"}
    assert {(k, n) for _, k, n, _ in asked} == {(4096, 4096)} == {*quantized}
    assert matmul == ["float16", "bfloat16"]
    assert compiled and all("uint4," in s.expression or "nvfp4" in s.expression for s in compiled)
    assert json.loads(output.read_text())["rows"][-1] == {"what": "repack"}
    asked.clear()
    quantized.clear()
    monkeypatch.setattr(sys, "argv", ["x", "--paths", "sm90"])
    module.main()
    assert len({(k, n) for _, k, n, _ in asked}) == 8 and not quantized
    asked.clear()
    table = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["x", "--act_order", "--table", str(table)])
    module.main()
    assert not asked and json.loads(table.read_text())["rows"] == []
    monkeypatch.setattr(sys, "argv", ["x", "--table", str(table)])
    with pytest.raises(SystemExit):
        module.main()


def test_tuner_keeps_what_is_as_fast(script, monkeypatch):
    """A choice changes for more than `--keep` percent; bfloat16 has those that differ only."""
    module = script("tune")
    usual, other = (GemmConfig(tokens, 1, 4, 1, 1, False) for tokens in (128, 256))
    times = {}
    weights = SimpleNamespace(copies=2)
    fake(module, monkeypatch, candidates=lambda *_: [usual, other], compile_first=list,
         RotatingWeights=SimpleNamespace(make=lambda *_, **__: weights), let_rest=lambda *_: None,
         graph_time=lambda launches, **_: times[launches[0]],
         _launch=lambda config, *_: config)  # fmt: skip
    cpu = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: cpu(*size))

    def chosen(dtype, us):
        times.update({usual: 100.0, other: us})
        options = argparse.Namespace(type="uint8b128", dtype=dtype, group_size=128, candidates=2,
                                     m=[256], keep=2.0, rest=0.0)  # fmt: skip
        found = module.tune_shape(64, 64, options, [])
        return [(choice["config"]["tokens"], choice["us"]) for choice in found]

    assert chosen("float16", 99.0) == [(128, 100.0)]
    assert chosen("float16", 97.0) == [(256, 97.0)]
    assert chosen("bfloat16", 99.0) == []
    assert chosen("bfloat16", 97.0) == [(256, 97.0)]


def test_plots_of_stored_runs(script, tmp_path, capsys):
    """Every kind that a benchmark writes, with its circumstances below."""
    pytest.importorskip("matplotlib")
    plot_bench = script("plot_bench")
    facts = {"gpu": "A GPU, 1 MHz", "torch": "2.99", "commit": "abc1234", "command": "x.py --m 1"}
    marlin = [
        {"k": 64, "n": n, "m": m, "what": what, "speedup": 1.5}
        for n in (64, 128)
        for m in (0, 1)
        for what in ("torch.matmul", "a", "b")
    ]
    for name, rows, upwards, lines in (
        ("bench", [row(), row(m=2), row(m=1, dtype="bfloat16")], "speed-up", [1, 1]),
        ("marlin", marlin, "speed-up", [2, 2]),
        ("sparse", [{"m": m, "k": 4, "n": 4, "kernel": "a", "tflops": 1.0} for m in (1, 2)],
         "TFLOP/s", [1]),
    ):  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"circumstances": facts, "rows": rows}))
        upwards_of, found = plot_bench.panels(rows)
        assert upwards_of.startswith(upwards) and [len(p.lines) for p in found] == lines
        arguments = [str(file), "--output", str(tmp_path / "plots"), "--format", "svg"]
        assert plot_bench.main(arguments) == 0
        text = Path(capsys.readouterr().out.strip()).read_text()
        assert "<svg" in text and "A GPU, torch 2.99, commit abc1234: x.py --m 1" in text
    assert plot_bench.caption(facts) == plot_bench.caption({"circumstances": facts})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "No such file"),
        ("run.txt", "", "is neither .pkl nor .json"),
        ("run.json", "{}", "holds no rows of a benchmark"),
        ("run.json", '{"rows": [{"k": 1}]}', "rows with k are of no benchmark that is plotted"),
        ("run.json", "{", "Expecting property name"),
        ("run.pkl", "x", "error:"),
    ],
)
def test_what_cannot_be_plotted_is_said(name, content, message, script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / name).write_text(content)
    assert script("plot_bench").main([str(tmp_path / name), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_generation(script, tmp_path, capsys):
    bench = script("bench_generate")
    command = "--size tiny --device cpu --dtype bfloat16 --variants eager --context 8 "
    command += "--new_tokens 3 --repeats 1 --prefill 16 --batch 1 2 --models plain packed unfused"
    output = tmp_path / "new" / "generate.json"
    report = bench.main([*command.split(), "--output", str(output)])
    assert [(r["model"], r["batch"]) for r in report["rows"]] == [
        (model, batch) for model in ("plain", "packed", "unfused") for batch in (1, 2)
    ]
    for r in report["rows"]:
        assert r["ms_per_token"] > 0 and r["logits_difference"] < 0.05
        assert r["tokens_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms_per_token"])
    assert [p["tokens"] for p in report["prefill"]] == [16] * 3
    written = json.loads(output.read_text())
    assert written == report
    assert written["circumstances"]["options"]["output"] == "generate.json"
    assert str(tmp_path) not in output.read_text()
    assert "prefill of 16 tokens, packed" in capsys.readouterr().out


def test_a_model_that_computes_other_things_is_not_timed(script, monkeypatch):
    bench = script("bench_generate")
    make = bench.make_model

    def other_weights(name, config, options):
        model = make(name, config, options)
        if name == "packed":
            model.model.layers[0].mlp.down_proj.scales.mul_(1.5)
        return model

    monkeypatch.setattr(bench, "make_model", other_weights)
    command = "--size tiny --device cpu --dtype bfloat16 --variants eager --context 8 --prefill 0"
    with pytest.raises(AssertionError, match="logits of the packed model differ"):
        bench.main([*command.split(), "--new_tokens", "1", "--repeats", "1"])
