"""Examples of the command line, which each command's --help shows."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("genai-fast demo", "genai-fast train dcgan --data PHOTOS --size 64", "genai-fast sample runs/dcgan-PHOTOS"),
    "train": (
        "genai-fast train dcgan --help",
        "genai-fast train gpt --data BOOK.txt --run book",
        "genai-fast train gpt --run book --resume --epochs 20",
    ),
    "train vae": (
        "genai-fast train vae --data mnist --epochs 20",
        "genai-fast train vae --data mnist --latent 2 --run plane",
    ),
    "train conv-vae": (
        "genai-fast train conv-vae --data PAINTINGS --size 128 --beta 4",
        "genai-fast train conv-vae --data PHOTOS.zip --size 64 --flip 0.5 --precision bfloat16",
    ),
    "train cvae": ("genai-fast train cvae --data mnist --latent 16 --epochs 20",),
    "train autoencoder": ("genai-fast train autoencoder --data PHOTOS --size 64 --latent 64",),
    "train mlp-gan": ("genai-fast train mlp-gan --data mnist --smoothing 0.1",),
    "train dcgan": (
        "genai-fast train dcgan --data PHOTOS --size 64 --flip 0.5 --ema 0.999",
        "genai-fast train dcgan --data mnist --network dense --epochs 30",
        "genai-fast train dcgan --run dcgan-PHOTOS --resume --epochs 100",
    ),
    "train cgan": ("genai-fast train cgan --data mnist --width 32",),
    "train wgan-gp": ("genai-fast train wgan-gp --data cifar-10-batches-py --n-critic 5 --penalty 10",),
    "train gpt": (
        "genai-fast train gpt --data BOOK.txt --layers 6 --width 384 --block 256",
        "genai-fast train gpt --data LETTERS --init gpt-BOOK --lr 1e-4 --epochs 3",
    ),
    "train lstm": ("genai-fast train lstm --data REVIEWS.jsonl --tokenizer char",),
    "train seq2seq": (
        "genai-fast train seq2seq --data CATALOGUES --tokenizer bpe --vocabulary 4096",
        "genai-fast train seq2seq --data PAIRS.tsv --init seq2seq-TEXT",
    ),
    "train text-vae": ("genai-fast train text-vae --data SENTENCES.txt --annealing 2000 --word-dropout 0.3",),
    "train vrnn": ("genai-fast train vrnn --data BOOK.txt --tokenizer char --block 64",),
    "sample": (
        "genai-fast sample runs/dcgan-mnist --count 100 --out grid.png",
        "genai-fast sample runs/cgan-mnist --class 7 --count 1000 --out sevens",
    ),
    "interpolate": ("genai-fast interpolate runs/vae-mnist --pairs 4 --steps 12 --out ways.png",),
    "inpaint": (
        "genai-fast inpaint runs/conv-vae-PHOTOS --data DAMAGED --box 16,16,32,32",
        "genai-fast inpaint runs/vae-mnist --data mnist --mask scratch.png --out repaired.png",
    ),
    "reconstruct": ("genai-fast reconstruct runs/autoencoder-PHOTOS --count 8",),
    "generate": (
        'genai-fast generate runs/gpt-BOOK --prompt "It was" --max-tokens 300',
        'genai-fast generate runs/gpt-BOOK --prompt "It was" --temperature 0 --stop "."',
        "genai-fast generate runs/seq2seq-PAIRS --prompts questions.txt --out answers.jsonl",
    ),
    "export": (
        "genai-fast export runs/gpt-BOOK --out book",
        "genai-fast export runs/dcgan-mnist --out generator.safetensors",
        "genai-fast export runs/dcgan-mnist --out digits --onnx",
    ),
    "profile": (
        "genai-fast profile dcgan --compare eager,compile,fused --batch 128 --precision bf16",
        "genai-fast profile gpt --data BOOK.txt",
        "genai-fast profile train.py:train --out where-the-time-goes",
    ),
    "tune": (
        "genai-fast tune dcgan-64-generator dcgan-64-discriminator --batch 64",
        "genai-fast tune net.py:make --input 3x64x64 --channels-last --out paths.md",
    ),
    "doctor": ("genai-fast doctor", "genai-fast doctor --json"),
    "demo": ("genai-fast demo",),
    "demo-gan": ("genai-fast demo-gan --epochs 5",),
    "demo-text": ("genai-fast demo-text --out elsewhere",),
}
