"""WGAN-GP on digits in a loop of one's own, around `Step`: python examples/own_training_loop.py [--steps N]"""

import argparse

import torch

import genai_fast
from genai_fast import models
from genai_fast.training import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images = genai_fast.data.load("mnist", size=32)

    # The critic has no batch norm, as its gradient penalty is of each sample; second derivatives pass the fused blocks.
    generator = models.DCGANGenerator(32, channels=1, width=16)
    gan = models.WGANGP(generator, models.DCGANDiscriminator(32, channels=1, width=16, norm="instance"))
    step = Step(gan, torch.optim.Adam(gan.parameters(), lr=1e-4, betas=(0.0, 0.9)))

    done, epoch = 0, 0
    while done < steps:
        for (x,) in genai_fast.data.batches(images, 5 * 16, seed=0, epoch=epoch, signed=True, whole=True):
            losses = step(x)  # five batches of 16 for the critic, one for the generator; a captured graph on CUDA
            done += 1
            if done % 20 == 0 or done == steps:
                print(
                    f"step {done}: " + ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses._asdict().items())
                )
            if done == steps:
                break
        epoch += 1


if __name__ == "__main__":
    main()
