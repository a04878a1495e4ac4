"""Architectures that are in no library here, as small modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, VOCABULARY = 10, 40


class UNet(nn.Module):
    """Two levels, batch normalisation, transposed convolutions, skips by concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter, self.down = self._block(3, width), self._block(width, 2 * width)
        self.bottom = self._block(2 * width, 4 * width)
        self.lift = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up = self._block(4 * width, 2 * width)
        self.rise = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.leave = self._block(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        coarse = self.down(nn.functional.max_pool2d(fine, 2))
        deep = self.lift(self.bottom(nn.functional.max_pool2d(coarse, 2)))
        deep = self.rise(self.up(torch.cat([deep, coarse], 1)))
        return self.out(self.leave(torch.cat([deep, fine], 1)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))  # type: ignore[no-any-return]


class DiffusionUNet(nn.Module):
    """Predicts noise: group normalisations, an embedding of the time that scales and shifts features, attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.enter, self.down = nn.Conv2d(3, width, 3, padding=1), TimedBlock(width, width, 4 * width)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = TimedBlock(2 * width, 2 * width, 4 * width)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.attention = nn.MultiheadAttention(2 * width, 2, batch_first=True)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = TimedBlock(2 * width, width, 4 * width)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        half = self.width // 2
        angles = time[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, device=time.device) / half)
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        fine = self.down(self.enter(x), embedded)
        deep = self.middle(self.shrink(fine), embedded)
        places = self.norm(deep).flatten(2).mT
        deep = deep + self.attention(places, places, places, need_weights=False)[0].mT.reshape(deep.shape)
        deep = self.grow(F.interpolate(deep, scale_factor=2.0))
        return self.leave(self.up(torch.cat([deep, fine], 1), embedded))  # type: ignore[no-any-return]


class TimedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedded: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Linear(embedded, 2 * outputs)
        self.norm, self.second = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(embedded))[:, :, None, None].chunk(2, 1)
        inner = F.silu(self.norm(self.first(x)) * (1 + scale) + shift)
        return self.skip(x) + self.second(inner)  # type: ignore[no-any-return]


class FourierOperator(nn.Module):
    """An FNO: products with weights of its own for each of the low frequencies, beside convolutions of size 1.

    Weights are stored as pairs of real numbers. Those of a complex dtype are refused before a merge.
    """

    def __init__(self, width: int = 8, modes: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, width, 1), nn.Conv2d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for spectral, local in zip(self.spectral, self.local):
            x = F.gelu(spectral(x) + local(x))
        return self.leave(x)  # type: ignore[no-any-return]


class SpectralConvolution(nn.Module):
    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        low = spectrum[:, :, : self.modes, : self.modes]
        product = torch.zeros_like(spectrum)
        product[:, :, : self.modes, : self.modes] = torch.einsum(
            "bixy,ioxy->boxy", low, torch.view_as_complex(self.weight)
        )
        return torch.fft.irfft2(product, s=x.shape[-2:])  # type: ignore[no-any-return]
