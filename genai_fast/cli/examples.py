"""Examples that each command's --help shows."""

_LINES = """\
genai-fast train dcgan --help
genai-fast train gpt --data BOOK.txt --run book
genai-fast train gpt --run book --resume --epochs 20
genai-fast sample runs/dcgan-mnist --count 100 --out grid.png
genai-fast sample runs/cvae-mnist --classes all --count 500 --out generated
genai-fast sample runs/audio-vae-DRUMS --count 20 --out drums.wav
genai-fast interpolate runs/vae-mnist --pairs 4 --steps 12 --out between.png
genai-fast interpolate runs/conv-vae-PHOTOS --traverse --pairs 10
genai-fast interpolate runs/audio-vae-DRUMS --between a.wav b.wav --steps 8
genai-fast inpaint runs/conv-vae-PHOTOS --data DAMAGED --box 16,16,32,32
genai-fast inpaint runs/vae-mnist --data mnist --mask scratch.png --out repaired.png
genai-fast reconstruct runs/autoencoder-PHOTOS --count 8
genai-fast reconstruct runs/audio-vae-DRUMS --data OTHERS.zip --out drums.wav
genai-fast compress runs/autoencoder-PHOTOS --data OTHERS --out others.safetensors
genai-fast decompress runs/autoencoder-PHOTOS others.safetensors --out others
genai-fast translate runs/cyclegan-HORSES --to b --data PHOTOS --out ZEBRAS
genai-fast translate runs/cyclegan-mnist --to a --data digits --count 12 --out digits.png
genai-fast upscale runs/srgan-PHOTOS photo.png --out large.png
genai-fast generate runs/gpt-BOOK --prompt "It was" --max-tokens 300
genai-fast generate runs/gpt-BOOK --prompt "It was" --temperature 0 --stop "."
genai-fast generate runs/seq2seq-PAIRS --prompts questions.txt --out answers.jsonl
genai-fast export runs/gpt-BOOK --out book
genai-fast export runs/gpt-BOOK --format hf --out book-hf
genai-fast export runs/dcgan-mnist --out digits --onnx
genai-fast augment-study runs/cvae-mnist --count 200 --seeds 10
genai-fast profile dcgan --compare eager,compile,fused --batch 128 --precision bf16
genai-fast profile gpt --data BOOK.txt
genai-fast profile train.py:train --out where-the-time-goes
genai-fast tune dcgan-64-generator dcgan-64-discriminator --batch 64
genai-fast tune net.py:make --input 3x64x64 --channels-last --out choices.md
genai-fast tune --forget
genai-fast doctor
genai-fast doctor --json
genai-fast demo
genai-fast demo-gan --epochs 5
genai-fast demo-text --out elsewhere
"""

EXAMPLES: dict[str, list[str]] = {
    "": ["genai-fast demo", "genai-fast train dcgan --data PHOTOS --size 64", "genai-fast sample runs/dcgan-PHOTOS"]
}
for _line in _LINES.splitlines():
    EXAMPLES.setdefault(_line.split()[1], []).append(_line)
