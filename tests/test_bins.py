"""Old `.bin` weights: tensors and nothing else, and each that is listed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from peft_mllm.bins import read_bin, read_bins
from peft_mllm.errors import ModelError
from peft_mllm.weights import local_directory, read_weights, weight_files, weight_names

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def write_shards(directory: Path, *, listed: dict[str, str] | None = None) -> Path:
    torch.save({"a": TENSORS["a"]}, directory / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": TENSORS["b"]}, directory / "pytorch_model-00002-of-00002.bin")
    where = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"} | (listed or {})
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def assert_all(read):
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_single_file(tmp_path, zipped):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_all(read_bins(tmp_path))
    assert weight_names(tmp_path) == set(TENSORS)


def test_shards(tmp_path):
    write_shards(tmp_path)
    assert_all(read_bins(tmp_path))
    assert weight_names(tmp_path) == set(TENSORS)
    assert [file.name[-8:] for file in weight_files(tmp_path)] == ["0002.bin", "0002.bin"]


def test_a_parameter_is_read_as_its_tensor(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.bin")
    assert not read_bin(tmp_path / "x.bin")["w"].requires_grad


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-exist",)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"a": torch.ones(2), "run": Evil()}, r"Python objects \(posix\.system\).*could run code"),
        ({"a": torch.ones(2), "where": Path("x")}, r"Python objects \(pathlib"),
        ([torch.ones(2)], "holds a list"),
        ({"a": torch.ones(2), "step": 3}, "step are no tensors"),
    ],
    ids=["code", "object", "list", "number"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_holds_more_than_tensors_is_refused(tmp_path, held, said, zipped):
    torch.save(held, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=said) as refused:
        read_bin(tmp_path / "x.bin")
    assert str(tmp_path / "x.bin") in str(refused.value)
    assert "weights_only" not in str(refused.value)  # torch's own message says how to switch it off


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kept", [0, 10, 300, 900, -1], ids=str)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_to_be_had_again(tmp_path, kept, zipped):
    torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[: min(kept, len(content) - 1)])
    with pytest.raises(ModelError, match=r"x\.bin (is damaged or incomplete|holds Python objects).*download it again"):
        read_bin(tmp_path / "x.bin")


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    (tmp_path / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13\n")
    with pytest.raises(ModelError, match="git-lfs pointer"):
        read_bin(tmp_path / "x.bin")


def test_a_missing_shard_is_named(tmp_path):
    (write_shards(tmp_path) / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.bin is missing"):
        list(read_bins(tmp_path))


def test_a_tensor_that_the_index_lists_must_be_there(tmp_path):
    write_shards(tmp_path, listed={"c": "pytorch_model-00001-of-00002.bin"})
    with pytest.raises(ModelError, match=r"00001-of-00002\.bin lacks c"):
        list(read_bins(tmp_path))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": "../x.bin"}}'])
def test_a_strange_index_is_refused(tmp_path, index):
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        list(read_bins(tmp_path))


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(ModelError, match="has no weights"):
        list(read_weights(tmp_path))
    assert weight_names(tmp_path) == set()


def test_safetensors_go_first_and_are_checked_likewise(tmp_path):
    from safetensors.torch import save_file

    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_all(read_weights(tmp_path))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        list(read_weights(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors", "b": "part.safetensors", "c": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"part\.safetensors lacks c"):
        list(read_weights(tmp_path))


def test_where_a_model_lies(tmp_path):
    assert local_directory(tmp_path) == tmp_path
    for nowhere in (tmp_path / "nothing", "./nothing", "~/nothing"):
        with pytest.raises(ModelError, match=r"nothing is no directory\."):
            local_directory(nowhere)
    with pytest.raises(ModelError, match="nobody/nothing is no directory here, and cannot be had from the hub"):
        local_directory("nobody/nothing")
