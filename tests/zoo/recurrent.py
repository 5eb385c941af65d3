"""Recurrent classifiers."""

import torch
from torch import Tensor, nn

from zoo.layers import ConvNorm


class LstmClassifier(nn.Module):
    """Token embedding, two bidirectional LSTM layers, the last hidden states of both directions."""

    def __init__(self, tokens: int = 60, width: int = 20, hidden: int = 26):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 5)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(ids))
        return self.head(torch.cat([hidden[-2], hidden[-1]], dim=1))


class GruClassifier(nn.Module):
    """Two GRU layers over a series; the last output is classified."""

    def __init__(self, width: int = 9, hidden: int = 34):
        super().__init__()
        self.gru = nn.GRU(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, 22), nn.ReLU(), nn.Linear(22, 5))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.head(out[:, -1, :])


class Crnn(nn.Module):
    """Text recognition: convolutions down to one row, columns as time steps, a bidirectional LSTM, a class each."""

    def __init__(self, hidden: int = 26):
        super().__init__()
        self.features = nn.Sequential(
            *(ConvNorm(1, 14), nn.MaxPool2d(2), ConvNorm(14, 22), nn.MaxPool2d(2)),
            *(ConvNorm(22, 30), nn.MaxPool2d((2, 1)), nn.Conv2d(30, 30, (2, 1)), nn.ReLU()),
        )
        self.lstm = nn.LSTM(30, hidden, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).squeeze(2).permute(0, 2, 1)
        return self.head(self.lstm(x)[0])
