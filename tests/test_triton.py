"""triton: the layout and the config of a model repository."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Net
from onnx import TensorProto, helper
from test_cli import onnxmerge, pair, tiny  # noqa: F401 (fixtures)

from onnxmerge.errors import UsageError
from onnxmerge.methods.triton_config import TYPES, Array, Config, parse_text
from onnxmerge.runtime.session import open_session, run

WANTED = """\
name: "both"
backend: "onnxruntime"
max_batch_size: 4
input [
  {
    name: "x"
    data_type: TYPE_FP32
    dims: [ 1, 8, 8 ]
  }
]
output [
  {
    name: "a/logits"
    data_type: TYPE_FP32
    dims: [ 4 ]
  },
  {
    name: "b/logits"
    data_type: TYPE_FP32
    dims: [ 4 ]
  }
]
dynamic_batching { }
"""


@pytest.fixture
def merged(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert onnxmerge("pack", *pair, "-o", "merged.onnx")[0] == 0
    return tmp_path / "merged.onnx"


def test_the_layout_and_the_config(merged: Path) -> None:
    code, stdout, stderr = onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--max-batch", 4)
    assert code == 0, stderr
    assert sorted(str(p) for p in Path("repo").rglob("*") if p.is_file()) == [
        "repo/both/1/model.onnx",
        "repo/both/config.pbtxt",
    ]
    assert Path("repo/both/config.pbtxt").read_text() == WANTED
    assert Path("repo/both/1/model.onnx").read_bytes() == merged.read_bytes()
    assert "versions: 1" in stdout


def test_versions_stand_side_by_side_and_a_config_that_was_edited_stays(merged: Path) -> None:
    assert onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--max-batch", 4)[0] == 0
    config = Path("repo/both/config.pbtxt")
    edited = "# ours\n" + WANTED.replace("dims: [ 4 ]", "dims: 4") + "instance_group [ { count: 2 kind: KIND_CPU } ]\n"
    config.write_text(edited)
    first = Path("repo/both/1/model.onnx").stat().st_mtime_ns
    code, stdout, stderr = onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--version", 2)
    assert code == 0, stderr
    assert "versions: 1, 2" in stdout and "(as it was)" in stdout
    assert config.read_text() == edited and Path("repo/both/1/model.onnx").stat().st_mtime_ns == first
    code, _, stderr = onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--version", 2)
    assert code == 2 and "this version is there already" in stderr
    assert onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--version", 2, "--overwrite")[0] == 0
    assert config.read_text() == edited
    assert sorted(p.name for p in Path("repo/both").iterdir()) == ["1", "2", "config.pbtxt"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name: "both"', 'name: "other"', "its name is 'other', not 'both'"),
        ('backend: "onnxruntime"', 'platform: "tensorrt_plan"', "it is for tensorrt_plan"),
        ('backend: "onnxruntime"', 'backend: "python"', "it is for python"),
        ("dims: [ 1, 8, 8 ]", "dims: [ 3, 8, 8 ]", "the input 'x' has the sizes [1, 8, 8], not [3, 8, 8]"),
        ("dims: [ 1, 8, 8 ]", "dims: [ 1, 8 ]", "the input 'x' has the sizes"),
        ("TYPE_FP32", "TYPE_FP16", "the input 'x' is of type TYPE_FP32, not TYPE_FP16"),
        ('"b/logits"', '"c/logits"', "the model has no output 'c/logits'"),
        ('"x"', '"y"', "the model has no input 'y'"),
        ("input [", "inputs [", "it lacks the input 'x'"),
        ("dims: [ 1, 8, 8 ]", "dims: [ 1, 8, 8 }", "is no protobuf text"),
        ("dims: [ 1, 8, 8 ]", "dims: [ 1, 8, 8", "is no protobuf text"),
        ("max_batch_size: 4", "max_batch_size: \\", "is no protobuf text"),
    ],
)
def test_a_config_that_contradicts_the_model_is_refused(merged: Path, old: str, new: str, said: str) -> None:
    assert onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--max-batch", 4)[0] == 0
    config = Path("repo/both/config.pbtxt")
    config.write_text(WANTED.replace(old, new))
    code, _, stderr = onnxmerge("triton", merged, "-o", "repo", "--name", "both", "--version", 2)
    assert code == 2 and said in stderr and "config.pbtxt" in stderr
    assert not Path("repo/both/2").exists() and config.read_text() == WANTED.replace(old, new)


def test_another_largest_batch_contradicts_too(merged: Path) -> None:
    assert onnxmerge("triton", merged, "-o", "repo", "--max-batch", 4)[0] == 0
    code, _, stderr = onnxmerge("triton", merged, "-o", "repo", "--max-batch", 2, "--version", 2)
    assert code == 2 and "its max_batch_size is 4, not 2" in stderr
    # the only version is replaced as a whole
    assert onnxmerge("triton", merged, "-o", "repo", "--max-batch", 2, "--overwrite")[0] == 0
    assert "max_batch_size: 2" in Path("repo/merged/config.pbtxt").read_text()


def fixed(path: Path) -> Path:
    net = Net()
    net.output(net.conv(net.input([1, 3, 8, 8]), 4))
    onnx.save(net.proto(), path)
    return path


def test_a_fixed_batch_is_an_axis_like_others(tmp_path: Path) -> None:
    model = fixed(tmp_path / "a.onnx")
    code, stdout, stderr = onnxmerge("triton", model, "-o", tmp_path / "repo")
    assert code == 0 and "max_batch_size: 0" in stdout, stderr
    text = (tmp_path / "repo/a/config.pbtxt").read_text()
    assert "dims: [ 1, 3, 8, 8 ]" in text and "dynamic_batching" not in text
    code, _, stderr = onnxmerge("triton", model, "-o", tmp_path / "other", "--max-batch", 2)
    assert code == 2 and "the first axis of 'x' is not free" in stderr and not (tmp_path / "other").exists()


def test_an_output_without_the_batch_is_found_by_running(tmp_path: Path) -> None:
    net = Net()
    x = net.input(["N", 3])
    net.output(net.op("Reshape", x, net.ints(1, -1)))
    model = net.proto(infer=False)
    onnx.save(model, tmp_path / "a.onnx")
    code, _, stderr = onnxmerge("triton", tmp_path / "a.onnx", "-o", tmp_path / "repo", "--max-batch", 2)
    assert code == 2 and "not" in stderr
    assert onnxmerge("triton", tmp_path / "a.onnx", "-o", tmp_path / "repo")[0] == 0
    text = (tmp_path / "repo/a/config.pbtxt").read_text()
    assert "max_batch_size: 0" in text and "dims: [ -1, 3 ]" in text


def test_one_number_for_each_sample_is_reshaped(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0), helper.make_node("Cast", ["y"], ["z"], to=7)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", "length"])],
        [helper.make_tensor_value_info("z", TensorProto.INT64, ["N"])],
        [onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    assert onnxmerge("triton", tmp_path / "a.onnx", "-o", tmp_path / "repo")[0] == 0
    config = parse_text((tmp_path / "repo/a/config.pbtxt").read_text())
    assert config["input"] == [{"name": ["x"], "data_type": ["TYPE_FP64"], "dims": [-1]}]
    assert config["output"] == [{"name": ["z"], "data_type": ["TYPE_INT64"], "dims": [1], "reshape": [{"shape": []}]}]
    assert onnxmerge("triton", tmp_path / "a.onnx", "-o", tmp_path / "repo", "--version", 2)[0] == 0


def test_external_data_go_into_a_folder(tmp_path: Path) -> None:
    model = onnx.load(tiny(tmp_path / "a.onnx"))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert onnxmerge("triton", tmp_path / "b.onnx", "-o", tmp_path / "repo")[0] == 0
    folder = tmp_path / "repo/b/1/model.onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "weights.bin"]
    x = np.ones((2, 1, 8, 8), np.float32)
    ours, theirs = (run(open_session(path), {"x": x}) for path in (folder / "model.onnx", tmp_path / "a.onnx"))
    np.testing.assert_array_equal(ours["logits"], theirs["logits"])


def test_a_full_disk_leaves_nothing(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    code, _, stderr = onnxmerge("triton", merged, "-o", "repo", "--name", "both")
    assert code == 2 and "No space left" in stderr and not list(Path("repo").iterdir())


@pytest.mark.parametrize("arguments", [["--name", "a/b"], ["--name", ".."], ["--name", ""], ["--version", 0]])
def test_bad_names_and_versions_are_refused(merged: Path, arguments: list[object]) -> None:
    assert onnxmerge("triton", merged, "-o", "repo", *arguments)[0] == 2
    assert not Path("repo").exists()


def test_the_text_format() -> None:
    text = """
    name: "a \\"b\\"" 'c'  # a comment
    input { name: "x"; dims: 1, dims: 2 } input: < name: "y" dims: [3, -1] >
    version_policy: { specific: { versions: [1, 3] } }
    rate: 1.5e-3 kind: KIND_GPU
    """
    assert parse_text(text) == {
        "name": ['a "b"c'],
        "input": [{"name": ["x"], "dims": [1, 2]}, {"name": ["y"], "dims": [3, -1]}],
        "version_policy": [{"specific": [{"versions": [1, 3]}]}],
        "rate": ["1.5e-3"],
        "kind": ["KIND_GPU"],
    }
    for wrong in ("name", "name:", "a { b: 1", "a: ]", "}", "a: [1", "a: 1 }", '"a": 1', 'a: "b', "a: @"):
        with pytest.raises(UsageError, match="is no protobuf text"):
            parse_text(wrong)


def test_what_is_written_is_read_back_whatever_the_names() -> None:
    names = ["a/b", 'a"b', "a\\b", "a b", "ü", "a\nb"]
    config = Config("n", 0, [Array(name, "TYPE_FP32", (1, -1)) for name in names], [Array("o", "TYPE_BOOL", ())])
    assert [own["name"][0] for own in parse_text(config.text())["input"]] == names
    assert config.contradiction(parse_text(config.text())) is None


def test_protobuf_takes_the_text(tmp_path: Path) -> None:
    """A schema with the fields of Triton's that are used, under their numbers in its model_config.proto."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in enumerate(["INVALID", *dict.fromkeys(TYPES.values())]):
        kinds.value.add(name=f"TYPE_{name}", number=number)
    shape = file.message_type.add(name="ModelTensorReshape")
    shape.field.add(name="shape", number=1, type=3, label=3)
    array = file.message_type.add(name="ModelArray")
    array.field.add(name="name", number=1, type=9, label=1)
    array.field.add(name="data_type", number=2, type=14, label=1, type_name=".inference.DataType")
    array.field.add(name="dims", number=3, type=3, label=3)
    array.field.add(name="reshape", number=5, type=11, label=1, type_name=".inference.ModelTensorReshape")
    file.message_type.add(name="ModelDynamicBatching")
    whole = file.message_type.add(name="ModelConfig")
    whole.field.add(name="name", number=1, type=9, label=1)
    whole.field.add(name="backend", number=17, type=9, label=1)
    whole.field.add(name="max_batch_size", number=4, type=5, label=1)
    whole.field.add(name="input", number=5, type=11, label=3, type_name=".inference.ModelArray")
    whole.field.add(name="output", number=6, type=11, label=3, type_name=".inference.ModelArray")
    whole.field.add(name="dynamic_batching", number=11, type=11, label=1, type_name=".inference.ModelDynamicBatching")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    arrays = [Array('a/"b"\\', f"TYPE_{kind}", (-1, 3)) for kind in TYPES.values()]
    config = Config("n", 8, arrays, [Array("one", "TYPE_FP32", (-1,))])
    found = text_format.Parse(config.text(), made())
    assert [own.name for own in found.input] == [own.name for own in arrays]
    assert list(found.output[0].dims) == [1] and found.output[0].HasField("reshape")
    assert found.max_batch_size == 8 and found.HasField("dynamic_batching")
