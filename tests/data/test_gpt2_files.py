"""GPT-2 checkpoints on disk: settings that are honoured or refused, hostile files, and Hugging Face's tokenizers."""

import itertools
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch

from genai_fast.data import DataError, gpt2_files, text
from genai_fast.errors import UsageError
from genai_fast.models import GPT, load_gpt2

safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")


def model():
    torch.manual_seed(0)
    return GPT(50, 32, 2, 8, 128).eval()


def hugging_face(folder, settings=None, file="model.safetensors"):
    """A checkpoint as transformers saves it, of 8 heads."""
    folder.mkdir(exist_ok=True)
    matrix = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
    state = {name.removeprefix("transformer."): p for name, p in model().state_dict().items() if "lm_head" not in name}
    state = {name: (p.t() if matrix.search(name) else p).contiguous().clone() for name, p in state.items()}
    if file.endswith("bin"):
        torch.save(state, folder / file)
    else:
        safetensors.save_file(state, folder / file)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 8, "n_layer": 2, **settings}))
    return folder


X = torch.arange(20)[None]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_heads_are_what_the_settings_say(tmp_path, file, whole):
    path = hugging_face(tmp_path, {}, file)
    for heads in (None, 8):
        found = GPT.from_gpt2(path if whole else path / file, heads=heads)
        assert found.heads == 8 and torch.equal(found(X), model()(X))
    with pytest.raises(UsageError, match=r"n_head: expected 4, got 8; remedy: leave heads out"):
        GPT.from_gpt2(path, heads=4)
    (tmp_path / "config.json").unlink()
    assert GPT.from_gpt2(path).heads == 2 and GPT.from_gpt2(path, heads=8).heads == 8


def test_heads_of_a_trainers_file(tmp_path):
    arguments = {"n_head": 8, "n_layer": 2, "dropout": 0.1}
    torch.save({"model": model().state_dict(), "model_args": arguments, ("a", 1): 2}, tmp_path / "ckpt.pt")
    assert torch.equal(GPT.from_gpt2(tmp_path / "ckpt.pt")(X), model()(X))
    (tmp_path / "config.json").write_text('{"n_head": 4}')  # of something else
    assert GPT.from_gpt2(tmp_path / "ckpt.pt").heads == 8


SERVED = {
    "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"],
    "layer_norm_epsilon": [1e-5, 1e-05],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [True],  # the same function
    "quantization_config": [None],
    "n_inner": [None, 512],
    "resid_pdrop": [0.3],
    "n_head": [8],
}
REFUSED = {
    "activation_function": ["relu", "gelu", "silu", None, ["gelu_new"]],
    "layer_norm_epsilon": [1e-2, 1e-6, "1e-5", None],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "add_cross_attention": [True],
    "tie_word_embeddings": [False],
    "model_type": ["gpt_neo", "llama", {}],
    "quantization_config": [{"bits": 4}],
    "n_head": [0, -1, 2.0, "8", True, [8]],
    "n_layer": [1, 3, 10**9, "2"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SERVED.items() for value in values])
def test_settings_of_the_same_network(tmp_path, key, value):
    assert torch.equal(GPT.from_gpt2(hugging_face(tmp_path, {key: value}))(X), model()(X))


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values], ids=str
)
def test_settings_of_another_network_are_refused(tmp_path, key, value):
    with pytest.raises(UsageError, match=rf"config\.json: {key}: expected .*, got .*; remedy: ") as error:
        GPT.from_gpt2(hugging_face(tmp_path, {key: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'"x"'])
def test_settings_that_are_none(tmp_path, content):
    hugging_face(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json: expected Hugging Face's settings"):
        GPT.from_gpt2(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match="got a named pipe"):
        GPT.from_gpt2(tmp_path)


def state(**changed):
    return {**model().state_dict(), **changed}


STATES = {
    "layers": (lambda: state(**{"transformer.h.999999999.ln_1.weight": torch.ones(128)}), "expected all layers up to"),
    "layer": (lambda: state(**{"transformer.h.7.ln_1.weight": torch.ones(128)}), r"h\.2: expected all layers up to 7"),
    "digits": (lambda: state(**{f"transformer.h.{'9' * 5000}.x": torch.ones(1)}), "expected no such tensor"),
    "number": (lambda: {**state(), 5: torch.ones(1)}, "expected names of tensors"),
    "sparse": (lambda: state(**{"transformer.wpe.weight": torch.ones(32, 128).to_sparse()}), "a dense tensor"),
    "meta": (lambda: state(**{"transformer.wpe.weight": torch.ones(32, 128, device="meta")}), "a dense tensor"),
    "repeated": (lambda: state(**{"transformer.wte.weight": torch.ones(1, 1).expand(10**12, 128)}), "a dense tensor"),
    "none": (dict, "expected a matrix, got none"),
}


@pytest.mark.parametrize("case", STATES)
def test_tensors_that_are_no_gpt2(tmp_path, case):
    make, message = STATES[case]
    with pytest.raises(ValueError, match=message):
        load_gpt2(None, make(), heads=8)
    torch.save(make(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        GPT.from_gpt2(tmp_path / "a.pt", heads=8)


def nested_key(tmp_path, legacy):
    """A torch file with a dict whose key is a tuple of 2 ** 60 items, of sixty tuples."""
    memo = [bytes([k]) for k in range(61)]
    key = b"K\x01q\x00" + b"".join(b"0h" + a + b"h" + a + b"\x86q" + b for a, b in itertools.pairwise(memo))
    bomb = b"\x80\x02}" + key + b"K\x01s."
    torch.save({"a": 1}, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    if legacy:
        raw, small = (tmp_path / "whole.pt").read_bytes(), pickle.dumps({"a": 1}, protocol=2)
        assert small in raw
        (tmp_path / "bomb.pt").write_bytes(raw.replace(small, bomb))
        return tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as file:
        for name in whole.namelist():
            file.writestr(name, bomb if name.endswith("data.pkl") else whole.read(name))
    return tmp_path / "bomb.pt"


@pytest.mark.parametrize("legacy", [False, True])
def test_keys_that_take_for_ever_to_hash(tmp_path, legacy):
    with pytest.raises(DataError, match=r"expected \.safetensors, or a torch file .*, got tuples in tuples"):
        GPT.from_gpt2(nested_key(tmp_path, legacy))


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_of_both_forms(tmp_path, legacy):
    torch.save(model().state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(GPT.from_gpt2(tmp_path / "a.pt", heads=8)(X), model()(X))


HOSTILE = {
    "a.safetensors": [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9000) + b"{" * 9000],
    "a.pt": [b"", b"\x80\x02.", b"PK\x03\x04", b"x" * 100, b"\x80\x05\x96" + struct.pack("<Q", 1 << 50)],
}


@pytest.mark.parametrize(("name", "content"), [(name, raw) for name in HOSTILE for raw in HOSTILE[name]], ids=ascii)
def test_files_that_are_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*(safetensors|a matrix)") as error:
        GPT.from_gpt2(tmp_path / name)
    assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="got a named pipe"):
        gpt2_files.read(tmp_path / name)


SAMPLE = ["Some text, it's 12 wörds; 東京!\n\n  indented\tlines\n"] * 9 + ["other texts and words " * 9]


@pytest.fixture
def trained():
    found = tokenizers.ByteLevelBPETokenizer()
    found.train_from_iterator(SAMPLE, vocab_size=300, show_progress=False)
    found.add_special_tokens(["<|endoftext|>"])
    return found


def as_files(trained, folder):
    merges = json.loads(trained._tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "vocab.json").write_text(json.dumps(trained.get_vocab()))
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_hugging_faces_tokenizers_give_their_ids(tmp_path, trained):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    trained.save(str(whole / "tokenizer.json"))
    as_files(trained, parts)
    for path in (whole, whole / "tokenizer.json", parts, parts / "vocab.json"):
        found = text.read_tokenizer(path)
        assert found.size == trained.get_vocab_size() and found.end == trained.token_to_id("<|endoftext|>")
        for sample in (*SAMPLE, "Zażółć gęślą jaźń 123 <|endof"):
            assert found.encode(sample) == trained.encode(sample).ids and found.decode(found.encode(sample)) == sample
    found.save(tmp_path / "ours.json")
    assert text.read_tokenizer(tmp_path / "ours.json").digest == found.digest
    contents = json.loads((whole / "tokenizer.json").read_text())
    contents["model"]["merges"] = [" ".join(merge) for merge in contents["model"]["merges"]]  # of before 0.20
    (whole / "tokenizer.json").write_text(json.dumps(contents))
    assert text.read_tokenizer(whole).digest == found.digest


def changed(*path, value):
    def change(contents):
        for key in path[:-1]:
            contents = contents[key]
        contents[path[-1]] = value

    return change


def first_special(contents):
    vocabulary = contents["model"]["vocab"]
    contents["model"]["vocab"] = {token: (number + 1) for token, number in vocabulary.items()}
    contents["added_tokens"][0]["id"] = 0


OTHERS = {
    "normalizer": changed("normalizer", value={"type": "NFC"}),
    "add_prefix_space": changed("pre_tokenizer", "add_prefix_space", value=True),
    "pre_tokenizer": changed("pre_tokenizer", value={"type": "Whitespace"}),
    "use_regex": changed("pre_tokenizer", "use_regex", value=False),
    "type": changed("model", "type", value="WordPiece"),
    "dropout": changed("model", "dropout", value=0.1),
    "continuing_subword_prefix": changed("model", "continuing_subword_prefix", value="##"),
    "byte_fallback": changed("model", "byte_fallback", value=True),
    "as the last tokens": first_special,
    "ids other than": changed("model", "vocab", "!", value=5000),
    "expected": changed("model", "vocab", value=[]),
    "expected ": changed("model", "merges", value=3),
    "merges": changed("model", "merges", value=["a b c"]),
    "each of its 256": lambda contents: (
        contents["model"].update(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
        or contents["added_tokens"][0].update(id=1)
    ),
    "got": changed("added_tokens", value=[{"content": "[PAD]", "id": 1.5}]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_tokenizers_of_other_ways_are_refused(tmp_path, trained, case):
    trained.save(str(tmp_path / "tokenizer.json"))
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    OTHERS[case](contents)
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match=rf"tokenizer\.json: .*{case}.*; remedy: "):
        text.read_tokenizer(tmp_path)


def test_parts_of_tokenizers_that_do_not_serve(tmp_path, trained):
    with pytest.raises(DataError, match=r"expected tokenizer\.json or vocab\.json in this folder, got neither"):
        text.read_tokenizer(tmp_path)
    as_files(trained, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": trained.get_vocab_size()}))
    with pytest.raises(DataError, match=r"\[PAD\] as the last tokens"):
        text.read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    for name, content in (("merges.txt", b"\xff"), ("merges.txt", b"a b c\n"), ("vocab.json", b"[]")):
        as_files(trained, tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"expected .*; remedy: "):
            text.read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    as_files(trained, tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"merges\.txt: expected merges, two tokens a line, got No such file"):
        text.read_tokenizer(tmp_path)
