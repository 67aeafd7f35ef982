"""Small models, written as people write them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

NGF, NZ = 4, 6


class Generator(nn.Module):
    """As in PyTorch's DCGAN example."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(NZ, NGF * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(NGF * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(NGF * 4, NGF * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(NGF * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(NGF * 2, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    """As in PyTorch's DCGAN example."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, NGF, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(NGF, NGF * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(NGF * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(NGF * 2, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        if input.is_cuda and torch.cuda.device_count() > 1:
            output = nn.parallel.data_parallel(self.main, input, range(torch.cuda.device_count()))
        else:
            output = self.main(input)
        return output.view(-1, 1).squeeze(1)


class VAE(nn.Module):
    """Blocks in a ModuleList and in a Sequential of Sequentials."""

    def __init__(self):
        super().__init__()
        self.latent = 4
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU()) for a, b in ((3, 4), (4, 8))
        )
        self.fc_mu = nn.Linear(8 * 4, self.latent)
        self.decoder_input = nn.Linear(self.latent, 8 * 4)
        blocks = [
            nn.Sequential(nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1), nn.BatchNorm2d(b), nn.LeakyReLU())
            for a, b in ((8, 4), (4, 4))
        ]
        self.decoder = nn.Sequential(*blocks)
        self.final = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh())

    def forward(self, x):
        for block in self.encoder:
            x = block(x)
        mu = self.fc_mu(torch.flatten(x, start_dim=1))
        return self.final(self.decoder(self.decoder_input(mu).view(-1, 8, 2, 2))), mu


class PatchGAN(nn.Module):
    """pix2pix's critic: layers collected in a list."""

    def __init__(self, norm_layer=nn.BatchNorm2d):
        super().__init__()
        layers, width = [nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True)], 4
        for stride in (2, 1):
            conv, width = nn.Conv2d(width, width * 2, 4, stride, 1, bias=False), width * 2
            layers += [conv, norm_layer(width), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, input):
        """Standard forward."""
        return self.model(input)


def _double(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
                         nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.pool = _double(3, 4), _double(4, 8), nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.conv, self.out = _double(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = self.down1(x)
        x = self.up(self.down2(self.pool(skip)))
        x = torch.cat([skip, x], dim=1)
        return self.out(self.conv(x))


class SkipBlock(nn.Module):
    """pix2pix's: its first activation works in place on what the skip connection takes."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(3, 4, 4, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(True),
            nn.ConvTranspose2d(4, 3, 4, 2, 1),
            nn.BatchNorm2d(3),
        )

    def forward(self, x):
        x = x * 1.0
        return torch.cat([x, self.model(x)], 1)


class HandWritten(nn.Module):
    """A DCGAN generator whose forward calls layer by layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn0 = nn.Linear(NZ, 8 * 2 * 2), nn.BatchNorm1d(8 * 2 * 2)
        self.conv1, self.bn1 = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6, 0.8)
        self.conv2, self.bn2 = nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.act = nn.Conv2d(4, 3, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, z):
        x = F.relu(self.bn0(self.fc(z)))
        x = x.view(x.size(0), 8, 2, 2)
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2, inplace=True)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.act(x)
        return torch.tanh(self.conv3(x))


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        out += identity
        out = self.relu(out)
        return out


class Shared(nn.Module):
    """One norm and one convolution used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        h = F.silu(self.bn(self.conv(x)))
        return torch.sigmoid(self.bn(self.conv(h + x)))


class Branches(nn.Module):
    """What a norm gives is used twice, and so is what a convolution gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.conv(x)
        a = self.bn1(h)
        return F.relu(a) + a.tanh() + self.bn2(h).relu() * h


class Spectral(nn.Module):
    """Two kinds of spectral norm on convolutions, and a norm between that is free of it."""

    def __init__(self):
        super().__init__()
        self.old = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.new = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.LeakyReLU(0.2))

    def forward(self, x):
        return self.new(self.old(x))


class Upsampler(nn.Module):
    """Dense to images as in PyTorch-GAN, whose BatchNorm2d(c, 0.8) sets eps; and 1-d and 3-d norms."""

    def __init__(self):
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(NZ, 4 * 9))
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, 0.8),
            nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3, momentum=None), nn.SiLU(),
        )  # fmt: skip
        self.line = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
        self.volume = nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2, affine=False), nn.Tanh())

    def forward(self, z):
        images = self.blocks(self.l1(z).view(z.shape[0], 4, 3, 3))
        return self.line(images.flatten(2)), self.volume(images.unsqueeze(1))


class OneNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), norm, nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def images(*shape):
    return lambda: torch.randn(*shape)


MODELS = {
    "dcgan_generator": (Generator, images(5, NZ, 1, 1)),
    "dcgan_discriminator": (Discriminator, images(5, 3, 16, 16)),
    "vae": (VAE, images(6, 3, 8, 8)),
    "patchgan": (PatchGAN, images(4, 3, 32, 32)),
    "unet": (UNet, images(4, 3, 8, 8)),
    "skip_block": (SkipBlock, images(4, 3, 8, 8)),
    "hand_written": (HandWritten, images(7, NZ)),
    "resnet_block": (ResBlock, images(4, 3, 8, 8)),
    "shared": (Shared, images(4, 3, 8, 8)),
    "branches": (Branches, images(4, 3, 8, 8)),
    "spectral": (Spectral, images(4, 3, 9, 9)),
    "upsampler": (Upsampler, images(6, NZ)),
}
