"""Runs as transformers reads them, and Hugging Face's folders as the beginning of a run."""

import json
import shutil

import pytest
import torch
from commands import call

from genai_fast import config
from genai_fast.data import text
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES
from genai_fast.runs import export, run
from genai_fast.training import checkpoint
from genai_fast.training.optimizer import make_optimizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "While it is so, nothing else is; naïve cafés cost 12 ¥.\n  If it were not, all would be as before. "
SMALL = {"layers": 2, "heads": 4, "width": 32, "block": 32}
RUNS = {
    "gpt": ("gpt", {}, "bpe"),
    "gpt of characters": ("gpt", {"dropout": 0.2}, "char"),
    "gpt of bytes": ("gpt", {}, "byte"),
    "llama": ("llama", {"rope_scaling": "llama3:8,1,4,16"}, "bpe"),
    "llama with biases": ("llama", {"bias": "all", "tied": False, "head_dim": 16}, "byte"),
    "mistral": ("llama", {"window": 5, "kv_heads": 1}, "byte"),
    "qwen2": ("llama", {"bias": "qkv", "window": 5, "full_layers": 1}, "byte"),
    "qwen3": ("llama", {"qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6}, "byte"),
}


def make_run(folder, recipe, settings, kind):
    settings = RECIPES[recipe].config(**SMALL, **settings)
    folder.mkdir()
    (folder / run.CONFIG).write_text(config.to_toml(settings, recipe))
    tokenizer = text.make_tokenizer(kind, [WORDS * 3], 270 if kind == "bpe" else None)
    tokenizer.save(folder / "tokenizer.json")
    about = {"recipe": recipe, "tokenizer": tokenizer.digest}
    torch.manual_seed(0)
    model, _ = run.task_of(recipe).open(recipe, settings, about, folder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    checkpoint.save(folder, model, make_optimizer(model, settings), 1, {}, about)
    return run.open_run(folder)


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_transformers_loads_what_is_exported(tmp_path, name):
    opened = make_run(tmp_path / "run", *RUNS[name])
    assert call("export", tmp_path / "run", "--format", "hf", "--out", tmp_path / "out") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__.lower().startswith("gpt2" if name.startswith("gpt") else name.split()[0])
    for written in (WORDS, "of <|endoftext|>? \ud7ff 日"):
        ids = opened.tokenizer.encode(written)
        if "<|" not in written:  # where they take it for the token
            assert tokenizer(written, add_special_tokens=False).input_ids == ids
        assert tokenizer.decode(ids) == opened.tokenizer.decode(ids)
    assert tokenizer.eos_token_id == opened.tokenizer.end == theirs.config.eos_token_id
    x = torch.tensor([opened.tokenizer.encode(WORDS)[:32]])
    torch.testing.assert_close(theirs(x).logits, opened.model(x), rtol=1e-4, atol=1e-4)
    again = run.open_run(tmp_path / "out")  # and so do we
    assert again.recipe == opened.recipe and torch.equal(again.model(x), opened.model(x))
    assert again.tokenizer.encode(WORDS) == opened.tokenizer.encode(WORDS)


def test_a_gpt_without_biases_has_zeros(tmp_path):
    opened = make_run(tmp_path / "run", *RUNS["gpt of bytes"])
    bare = type(opened.model)(257, 32, 2, 4, 32, bias=False)
    settings, tensors = RECIPES["gpt"].pretrained.written(bare)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    assert not theirs.load_state_dict(tensors, strict=False).unexpected_keys
    x = torch.arange(20)[None]
    torch.testing.assert_close(theirs(x).logits, bare(x), rtol=1e-4, atol=1e-4)


def test_what_transformers_has_no_model_of_is_refused(tmp_path):
    opened = make_run(tmp_path / "run", "llama", {"softcap": 3.0, "window": 5}, "byte")
    with pytest.raises(UsageError, match="--format hf: expected what a Llama, Mistral, Qwen 2 or Qwen 3 computes"):
        export.write_hugging_face(opened, tmp_path / "out")
    assert call("export", tmp_path / "run", "--format", "hf", "--out", tmp_path / "out.safetensors") == 2
    assert not (tmp_path / "out").exists()


def sentencepiece_like():
    """A tokenizer as Llama 2's and Mistral's are: a beginning, spaces as letters, bytes for what is unknown."""
    letters = sorted({*WORDS.replace(" ", "▁"), "▁"} - {"¥"})
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *letters, "▁i", "▁it"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: k for k, token in enumerate(vocabulary)}, [("▁", "i"), ("▁i", "t")], unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made, len(vocabulary)


def test_a_run_begins_with_a_folder_of_a_llama(tmp_path, monkeypatch, capsys):
    """It has the folder's settings and tokenizer, and is exported to such a folder again."""
    monkeypatch.chdir(tmp_path)
    tokenizer, size = sentencepiece_like()
    settings = dict(
        vocab_size=size + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=9, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**settings)).eval()
    theirs.save_pretrained("begun")
    tokenizer.save("begun/tokenizer.json")
    (tmp_path / "words.txt").write_text(WORDS * 40, encoding="utf-8")
    ids = tokenizer.encode("it is").ids
    assert call("generate", "begun", "--prompt", "it is", "--max-tokens", 8, "--temperature", 0) == 0
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    said = tokenizer.decode(expected.tolist())
    assert capsys.readouterr().out == f"{said}\n"
    new = expected[len(ids) :].tolist()
    ends = {"eos_token_id": [2, new[3]]}
    kept = (tmp_path / "begun" / "generation_config.json").read_text()
    (tmp_path / "begun" / "generation_config.json").write_text(json.dumps(ends))
    assert call("generate", "begun", "--prompt", "it is", "--max-tokens", 8, "--temperature", 0) == 0
    shorter = tokenizer.decode(ids + new[: new.index(new[3])])
    assert capsys.readouterr().out == f"{shorter}\n" and shorter != said
    (tmp_path / "begun" / "generation_config.json").write_text(kept)
    quick = ["--block", "32", "--batch-size", "4", "--lr", "1e-12", "--warmup", "0", "--epochs", "1"]
    assert call("train", "llama", "--data", "words.txt", *quick, "--init", "begun", "--run", "tuned") == 0
    assert "all tensors taken, 32 positions" in capsys.readouterr().err
    shutil.rmtree("begun")
    assert call("train", "llama", "--run", "tuned", "--resume", "--epochs", "2") == 0
    capsys.readouterr()
    assert call("generate", "tuned", "--prompt", "it is", "--max-tokens", 8, "--temperature", 0) == 0
    assert capsys.readouterr().out == f"{said}\n"
    assert call("export", "tuned", "--format", "hf", "--out", "out") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    loaded = transformers.AutoTokenizer.from_pretrained("out")
    assert loaded("naïve ¥").input_ids == tokenizer.encode("naïve ¥").ids
    found = run.open_run(tmp_path / "runs" / "tuned")
    x = torch.tensor([ids])
    torch.testing.assert_close(again(x).logits, found.model(x), rtol=1e-4, atol=1e-4)
    assert call("export", "tuned", "--out", "plain") == 0
    other = json.loads((tmp_path / "out" / "config.json").read_text()) | {"model_type": "gemma"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(other))
    assert call("generate", "out") == 2
    assert "model_type: expected one of gpt2, llama, mistral, qwen2, qwen3, got 'gemma'" in capsys.readouterr().err
