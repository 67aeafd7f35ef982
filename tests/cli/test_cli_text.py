"""Every recipe for text on a real file: trained, resumed, fine-tuned, made to write, taken elsewhere."""

import json
import pydoc_data.topics
import re
import shlex
import shutil

import pytest
import safetensors.torch
import torch
from commands import call, records

from genai_fast.data import text
from genai_fast.models import GPT, generate
from genai_fast.models.gpt.plain import PlainGPT
from genai_fast.runs import run, text_generation, text_task
from genai_fast.training import checkpoint

NETWORKS = {  # small ones
    "gpt": ["--layers", "1", "--heads", "2", "--width", "16", "--warmup", "2", "--decay", "none"],
    "lstm": ["--layers", "1", "--embedding", "8", "--hidden", "16"],
    "seq2seq": shlex.split("--layers 1 --heads 2 --width 16 --dropout 0.2 --batch-size 4 --warmup 0"),
    "text-vae": ["--embedding", "8", "--hidden", "16", "--latent", "4", "--annealing", "5", "--batch-size", "4"],
    "vrnn": ["--embedding", "8", "--hidden", "16", "--latent", "4"],
}
QUICK = ["--tokenizer", "byte", "--block", "32", "--batch-size", "16", "--log-every", "1"]
FIGURES = {"loss", "perplexity", "bits_per_byte"}
BOUND = FIGURES | {"reconstruction", "kl", "tokens"}
EXPECTED = {"gpt": FIGURES, "lstm": FIGURES, "seq2seq": FIGURES | {"nats", "tokens"}, "text-vae": BOUND, "vrnn": BOUND}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_task, "_SAMPLE", 20)
    topics = pydoc_data.topics.topics
    (tmp_path / "words.txt").write_text("\n\n".join(topics[k] for k in ("assert", "if", "while")), encoding="utf-8")
    return tmp_path


def train(recipe, name, *more, data="words.txt"):
    # Passages that are longer than a block are cut, and that is said.
    return call("train", recipe, "--data", data, *QUICK, *NETWORKS[recipe], "--run", name, *more)


def weights(run):
    return safetensors.torch.load_file(checkpoint.latest(run) / "model.safetensors")


def test_a_run_of_version_0_1_on_pydoc_resumes_on_the_text_of_that_version(here, monkeypatch):
    few = {name: text for name, text in pydoc_data.topics.topics.items() if name in ("assert", "if", "while")}
    monkeypatch.setattr(pydoc_data.topics, "topics", few)
    assert train("gpt", "old", "--epochs", "1", data="pydoc-0.1") == 0
    config = here / "runs" / "old" / "config.toml"
    config.write_text(config.read_text().replace('"pydoc-0.1"', '"pydoc"'))  # as that version named it
    assert call("train", "gpt", "--run", "old", "--resume", "--epochs", "2") == 0
    assert [record["epoch"] for record in records(here / "runs" / "old", "epoch")] == [1, 2]


@pytest.mark.parametrize("recipe", NETWORKS)
def test_every_recipe_trains_goes_on_exactly_and_writes(here, recipe, capsys):
    assert train(recipe, "straight", "--epochs", "2") == 0
    run = here / "runs" / "straight"
    epochs = records(run, "epoch")
    assert len(epochs) == 2 and set(epochs[-1]["validation"]) == EXPECTED[recipe]
    assert epochs[1]["train"]["loss"] < epochs[0]["train"]["loss"] or recipe == "text-vae"  # whose KL weight rises
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["epoch-0001.txt", "epoch-0002.txt"]
    assert (run / "sample.txt").exists() and (run / "curves.png").exists()

    assert train(recipe, "again", "--epochs", "1", "--checkpoint-every", "2") == 0
    again = here / "runs" / "again"
    newest = checkpoint.latest(again)
    shutil.rmtree(newest)  # the end of the epoch: the run goes on from within it
    assert records(again, "epoch")[0]["step"] > int(checkpoint.latest(again).name[-9:])
    assert call("train", recipe, "--run", "again", "--resume", "--epochs", "2") == 0
    a, b = weights(run), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    said = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert call("generate", "again", "--prompt", "The if", "--max-tokens", "40", "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("The if") == (recipe in ("gpt", "lstm", "vrnn"))


def test_a_gpt_goes_into_plain_pytorch(here):
    assert train("gpt", "a", "--epochs", "1") == 0
    assert call("export", "a", "--out", "gpt.safetensors") == 0
    opened = run.open_run(here / "runs" / "a")
    plain = PlainGPT(257, 32, 1, 2, 16).eval()
    plain.load_state_dict(safetensors.torch.load_file("gpt.safetensors"))
    ids = torch.tensor([opened.tokenizer.encode("while it is so")])
    with torch.no_grad():
        torch.testing.assert_close(opened.model(ids), plain(ids), atol=1e-5, rtol=1e-5)


def test_fine_tuning_names_what_does_not_match(here, capsys):
    pairs = [{"source": f"Give me {k}, please", "target": f"Here is {k}"} for k in range(60)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert train("seq2seq", "before", "--epochs", "1", "--tokenizer", "char") == 0
    capsys.readouterr()
    assert train("seq2seq", "after", "--epochs", "1", "--init", "before", data="pairs.jsonl") == 0
    said = capsys.readouterr().err
    assert re.search(r"before.*model\.safetensors: \d+ tensors taken\n", said)
    # Its tokenizer comes along: ids must mean what they meant.
    a, b = (text.read_tokenizer(here / "runs" / name / "tokenizer.json").digest for name in ("before", "after"))
    assert a == b

    # The run that it began with is not needed to go on.
    (here / "runs" / "before").rename(here / "elsewhere")
    assert call("train", "seq2seq", "--run", "after", "--resume", "--epochs", "2") == 0
    (here / "elsewhere").rename(here / "runs" / "before")

    deeper = [*NETWORKS["seq2seq"][2:], "--layers", "2", "--block", "16"]
    assert call("train", "seq2seq", "--data", "pairs.jsonl", *QUICK, *deeper, "--epochs", "1", "--init", "runs/before",
                "--run", "deeper") == 0  # fmt: skip
    said = capsys.readouterr().err
    assert re.search(r"these do not match: decoder_blocks\.1\..* \(expected \(\d+.*, got nothing\)", said)
    assert train("gpt", "other", "--init", "runs/before") == 2
    assert "expected weights of a GPT, got no tensor that fits" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """What transformers saves of a GPT-2, with a byte-level tokenizer of few merges."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = text.make_tokenizer("bpe", ["some words and some more words"] * 9, 270)
    torch.manual_seed(0)
    model = GPT(tokenizer.size, 64, 2, 4, 32)
    state = {}
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":
            turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            state[name.removeprefix("transformer.")] = (p.t() if turned else p).contiguous()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    settings = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
    (folder / "config.json").write_text(json.dumps(settings))
    contents = tokenizer._contents()
    ids = {token: k for k, token in enumerate([*contents["tokens"], "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = "\n".join(" ".join(merge) for merge in contents["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder, model.eval(), tokenizer


def test_a_folder_of_hugging_faces_gpt2_writes(gpt2_folder, capsys):
    folder, model, tokenizer = gpt2_folder
    assert call("generate", folder, "--prompt", "some words", "--max-tokens", 9, "--temperature", 0) == 0
    ids = list(generate(model, tokenizer.encode("some words"), max_tokens=9, temperature=0, stop_id=tokenizer.end))
    assert capsys.readouterr().out == f"some words{tokenizer.decode(ids)}\n"


@pytest.mark.parametrize("weights", ["", "model.safetensors"])
def test_a_run_begins_with_a_folder_of_hugging_faces_gpt2(here, gpt2_folder, capsys, weights):
    """It has the folder's sizes and tokenizer, whatever the settings say, and resumes without the folder."""
    folder, model, tokenizer = gpt2_folder
    moved = shutil.copytree(folder, here / "begun")
    quick = ["--block", "32", "--batch-size", "8", "--lr", "1e-12", "--warmup", "0", "--dropout", "0", "--epochs", "1"]
    assert call("train", "gpt", "--data", "words.txt", *quick, "--init", moved / weights, "--run", "tuned") == 0
    assert "all tensors taken, 32 positions" in capsys.readouterr().err
    opened = run.open_run(here / "runs" / "tuned")
    assert opened.tokenizer.digest == tokenizer.digest
    expected = model.state_dict()
    expected["transformer.wpe.weight"] = expected["transformer.wpe.weight"][:32]
    for name, p in opened.model.state_dict().items():
        torch.testing.assert_close(p, expected[name], atol=1e-6, rtol=0)
    shutil.rmtree(moved)
    assert call("train", "gpt", "--run", "tuned", "--resume", "--epochs", "2") == 0
    assert call("generate", "tuned", "--prompt", "some", "--max-tokens", 3) == 0


def test_a_folder_of_hugging_faces_gpt2_that_does_not_fit_together(here, gpt2_folder, capsys):
    begun = shutil.copytree(gpt2_folder[0], here / "begun")
    settings = json.loads((begun / "config.json").read_text())
    for key, value, message in (
        ("n_head", 5, "heads: expected a divisor of width=32, got 5"),
        ("n_embd", "32", "config.json: n_embd: expected at least 1, got '32'"),
        ("n_embd", 16, r"transformer.wte.weight: expected shape"),
        ("activation_function", "relu", "activation_function: expected gelu_new"),
    ):
        (begun / "config.json").write_text(json.dumps({**settings, key: value}))
        assert call("train", "gpt", "--data", "words.txt", "--block", "32", "--init", begun, "--run", "wrong") == 2
        assert message in capsys.readouterr().err
    (begun / "config.json").write_text(json.dumps(settings))
    vocabulary = json.loads((begun / "vocab.json").read_text())
    first, *_ = (begun / "merges.txt").read_text().split("\n")
    lost = [token for token in vocabulary if token not in text.make_tokenizer("bpe", ["x"], 257)._contents()["tokens"]]
    kept = [token for token in vocabulary if token not in lost] + ["<|endoftext|>"]
    (begun / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(kept)}))
    (begun / "merges.txt").write_text(f"{first}\n")
    for command in (["train", "gpt", "--data", "words.txt", "--init", begun, "--run", "wrong"], ["generate", begun]):
        assert call(*command) == 2
        assert re.search("wte.weight: expected shape|expected a tokenizer of 270 ids", capsys.readouterr().err)
    (begun / "vocab.json").unlink()
    assert call("generate", begun) == 2
    assert "expected tokenizer.json or vocab.json in this folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a small GPT, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "words.txt").write_text(pydoc_data.topics.topics["while"] * 4, encoding="utf-8")
    arguments = ["--data", folder / "words.txt", *QUICK, *NETWORKS["gpt"], "--batch-size", "4", "--epochs", "1"]
    assert call("train", "gpt", *arguments, "--out", folder, "--run", "run") == 0
    return folder / "run"


def test_prompts_from_a_file(here, trained, capsys):
    (here / "prompts.txt").write_text("The first\n\nWhile\n")
    flags = ["--max-tokens", "10", "--prompts", "prompts.txt", "--out", "out.jsonl"]
    assert call("generate", trained, *flags) == 0
    written = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [w["prompt"] for w in written] == ["The first", "While"]
    said = capsys.readouterr().out
    assert all(w["prompt"] + w["text"] in said for w in written) and said.count("--- ") == 2


def test_a_draft_changes_nothing_in_the_likeliest_text(here, trained, capsys):
    greedy = ["--prompt", "While", "--max-tokens", "30", "--temperature", "0"]
    assert call("generate", trained, *greedy) == 0
    expected = capsys.readouterr().out
    assert call("generate", trained, *greedy, "--draft", trained) == 0
    assert capsys.readouterr().out == expected
    assert call("generate", trained, *greedy, "--draft", trained, "--repetition-penalty", "2") == 2
    assert "--repetition-penalty: expected none with --draft" in capsys.readouterr().err
    assert call("generate", trained, *greedy, "--min-p", "2") == 2
    assert "--min-p: expected a number from 0 to 1, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_have_the_form_of_the_text_that_was_trained_on(here, trained, encoding):
    nfc, nfd = "Le caf\u00e9 ", "Le cafe\u0301 "  # the space at the end is the prompt's own
    (here / "prompts.txt").write_text(f"{nfd}\r\nWhile\n", encoding=encoding)
    assert call("generate", trained, "--max-tokens", "5", "--prompts", "prompts.txt", "--out", "a.jsonl") == 0
    for name, prompt in (("b.jsonl", nfd), ("c.jsonl", nfc), ("d.jsonl", f"\ufeff{nfc}")):
        assert call("generate", trained, "--max-tokens", "5", "--prompt", prompt, "--out", name) == 0
    lines = [(here / f"{name}.jsonl").read_text().splitlines() for name in "abcd"]
    assert [json.loads(line)["prompt"] for line in lines[0]] == [nfc, "While"]
    assert all(found[0] == lines[0][0] for found in lines)


def test_stop_strings_have_that_form_too(here, trained, monkeypatch):
    monkeypatch.setattr(text_generation, "_tokens", lambda model, tokenizer, *_: tokenizer.encode("un caf\u00e9 noir"))
    assert call("generate", trained, "--stop", "cafe\u0301", "--out", "a.jsonl") == 0
    assert json.loads((here / "a.jsonl").read_text())["text"] == "un "


MISTAKES = {
    "empty prompt": (["--prompt", ""], "--prompt: expected a text, got an empty one"),
    "empty file": (["--prompts", "empty.txt"], "empty.txt: expected one prompt per line, got an empty file"),
    "two": (["--prompt", "a", "--prompts", "empty.txt"], "--prompt TEXT or --prompts FILE, got both"),
    "no file": (["--prompts", "none.txt"], "none.txt"),
    "bytes": (["--prompts", "latin.txt"], "latin.txt: expected UTF-8"),
    "temperature": (["--temperature", "-1"], "--temperature: expected a number >= 0, got -1"),
    "nan": (["--temperature", "nan"], "--temperature: expected a number >= 0, got nan"),
    "top-p": (["--top-p", "1.5"], "--top-p: expected a number > 0 and <= 1, got 1.5"),
    "top-k": (["--top-k", "-2"], "--top-k: expected at least 0"),
    "tokens": (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
    "stop": (["--stop", ""], "--stop: expected strings that are not empty"),
    "folder": (["--out", "nowhere/out.jsonl"], "--out: expected a file in an existing folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_generating(here, trained, capsys, mistake):
    (here / "empty.txt").write_text("\n")
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    arguments, message = MISTAKES[mistake]
    assert call("generate", trained, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and re.search(message, said.err), said.err


def test_a_prompt_beyond_the_context_says_what_is_cut(trained, capsys):
    assert call("generate", trained, "--prompt", "x" * 50, "--max-tokens", "3") == 0
    message = r"warning: .*the prompt has 50 tokens, the model sees 32: the first 18 are cut"
    assert re.search(message, capsys.readouterr().err)


def test_another_tokenizer_than_the_runs_is_refused(here, trained, capsys):
    shutil.copytree(trained, here / "other")
    text.make_tokenizer("char", ["abc"]).save(here / "other" / "tokenizer.json")
    assert call("generate", "other", "--prompt", "a") == 2
    assert re.search(r"expected the tokenizer \w+ of the run's checkpoint, got \w+", capsys.readouterr().err)


TRAINING_MISTAKES = {
    "empty": (["gpt", "--data", "empty.txt"], "empty.txt"),
    "missing": (["gpt", "--data", "none.txt"], "none.txt"),
    "little": (["gpt", "--data", "little.txt", "--tokenizer", "byte"], "expected at least .* tokens for a batch"),
    "heads": (["gpt", "--data", "words.txt", "--heads", "5"], "heads"),
    "vocabulary": (["gpt", "--vocabulary", "100"], "vocabulary: expected a number >= 257"),
    "tokenizer": (["lstm", "--tokenizer", "word"], "tokenizer: expected bpe or char or byte"),
}


@pytest.mark.parametrize("mistake", TRAINING_MISTAKES)
def test_mistakes_in_training(here, capsys, mistake):
    (here / "empty.txt").write_text("")
    (here / "little.txt").write_text("A few words, and no more.\n\nA few others.")
    arguments, message = TRAINING_MISTAKES[mistake]
    assert call("train", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and re.search(message, said.err), said.err
    assert not (here / "runs").exists()


def test_commands_for_images_refuse_text_and_the_other_way_round(here, trained, capsys):
    assert call("sample", trained) == 2
    assert "expected a run of a model that can sample, got one of gpt" in capsys.readouterr().err
    assert call("train", "vae", "--data", "digits", "--epochs", "1", "--hidden", "4", "--run", "v") == 0
    capsys.readouterr()
    assert call("generate", "v") == 2
    assert "expected a run of a text model, got one of vae" in capsys.readouterr().err


def test_stop_strings_never_show_and_nothing_before_them_is_lost():
    def cut(pieces, *stops):
        return "".join(text_generation._until(iter(pieces), stops))

    assert cut(["ab", "c", "de"], "cd") == "ab"
    assert cut(["ab", "c", "e"], "cd") == "abce"
    assert cut(["aab"], "ab", "b") == "a" and cut(["x", "END"], "END", "E") == "x"
    assert cut(["a", "b"], "abc") == "ab" and cut(["abc"], "abc") == ""
    pieces = text_generation._until(iter(["one ", "tw", "o"]), ("two",))
    assert next(pieces) == "one "  # what cannot be a stop string comes at once


def test_repeated_sentences_are_left_out():
    def once(pieces, prompt=""):
        return "".join(text_generation._without_repeats(iter(pieces), prompt))

    assert once(["It is. It ", "is. Or is it? It  is.\nOr is it?\nSo."]) == "It is. Or is it? So."
    assert once(["He left. She stayed."], prompt="He left. ") == "She stayed."
    assert once(["3.5 is 3.5"]) == "3.5 is 3.5"
    pieces = text_generation._without_repeats(iter(["One. Two", ". Three"]), "")
    assert next(pieces) == "One. "  # sentence by sentence, as they come
