"""Transformers: ViT in three spellings of attention, an MLP-Mixer, a BERT encoder, GPT blocks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(), nn.Linear(hidden, width))


class _PackedAttention(nn.Module):
    """One dense layer makes queries, keys and values: reshape, permute to [3, batch, heads, tokens, size], attend."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        size = width // self.heads
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = functional.scaled_dot_product_attention(query, key, value)
        else:
            y = ((query * size**-0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return self.project(y.transpose(1, 2).reshape(batch, tokens, width))


class _TorchAttention(nn.Module):
    """torch's own module."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _Block(nn.Module):
    """Pre-norm: attention and a dense pair, each added to the stream."""

    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = attention, mlp(width, 2 * width + 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Patches, a class token, position embeddings, two blocks, the class token's norm and head.

    Args:
        attention: `fused` (scaled_dot_product_attention), `matmul` (written out), `torch` (nn.MultiheadAttention), or
            `layer` (nn.TransformerEncoderLayer, norm first).
    """

    def __init__(self, attention: str, width: int = 36, heads: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(self._block(attention, width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    @staticmethod
    def _block(attention: str, width: int, heads: int) -> nn.Module:
        if attention == "layer":
            return nn.TransformerEncoderLayer(
                width, heads, 2 * width + 10, activation="gelu", batch_first=True, norm_first=True
            )
        if attention == "torch":
            return _Block(width, _TorchAttention(width, heads))
        return _Block(width, _PackedAttention(width, heads, attention == "fused"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = mlp(tokens, 22), mlp(width, 82)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MlpMixer(nn.Module):
    """Dense pairs over tokens and over channels in turn."""

    def __init__(self, width: int = 34):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(_MixerBlock(16, width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class _BertLayer(nn.Module):
    """Post-norm, with separate query, key and value layers and scores written out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project, self.wide, self.narrow = nn.Linear(width, width), nn.Linear(width, 100), nn.Linear(100, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.size(-1)) + mask
        context = torch.matmul(functional.softmax(scores, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(self.project(context.view(*context.size()[:-2], x.size(-1))) + x)
        return self.norm2(self.narrow(functional.gelu(self.wide(x))) + x)


class Bert(nn.Module):
    """Token, position and type embeddings, an additive attention mask, two layers, a pooler and a classifier."""

    def __init__(self, tokens: int = 60, width: int = 36, heads: int = 3, length: int = 40):
        super().__init__()
        self.words, self.positions, self.types = (nn.Embedding(count, width) for count in (tokens, length, 2))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_BertLayer(width, heads) for _ in range(2))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(length).expand((1, -1)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = self.positions(self.position_ids[:, : input_ids.size(1)])
        x = self.norm(self.words(input_ids) + self.types(token_type_ids) + positions)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class _Conv1D(nn.Module):
    """A dense layer whose weight is stored as [in, out], applied to batch and tokens flattened together."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.outputs = outputs
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight / 4).view(size)


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, flattened: bool):
        super().__init__()
        self.heads, self.width = heads, width
        dense = _Conv1D if flattened else nn.Linear
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = dense(width, 3 * width), dense(width, width)
        self.wide, self.narrow = dense(width, 4 * width), dense(4 * width, width)
        self.register_buffer("causal", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        parts = self.attend(self.norm1(x)).split(self.width, dim=2)
        query, key, value = (p.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :tokens, :tokens] == 0, float("-inf"))
        y = (functional.softmax(scores, dim=-1) @ value).transpose(1, 2).contiguous().view(batch, tokens, width)
        x = x + self.project(y)
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Causal blocks; the output layer is the token embedding, transposed.

    Args:
        flattened: dense layers are GPT-2's Conv1D.
    """

    def __init__(self, flattened: bool = False, tokens: int = 61, width: int = 36, heads: int = 3, length: int = 40):
        super().__init__()
        self.words, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_GptBlock(width, heads, length, flattened) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(0, ids.size(1), dtype=torch.long, device=ids.device)
        return self.head(self.norm(self.blocks(self.words(ids) + self.positions(places))))


class _RmsNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: int):
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.norm1, self.norm2 = _RmsNorm(width), _RmsNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.project = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 82, bias=False) for _ in range(2))
        self.down = nn.Linear(82, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        query = _rotate(self.query(y).view(batch, tokens, self.heads, self.size).transpose(1, 2), cosine, sine)
        key = _rotate(self.key(y).view(batch, tokens, self.shared, self.size).transpose(1, 2), cosine, sine)
        value = self.value(y).view(batch, tokens, self.shared, self.size).transpose(1, 2)
        key, value = (self._repeat(t, batch, tokens) for t in (key, value))
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(batch, tokens, width))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    def _repeat(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        times = self.heads // self.shared
        spread = x[:, :, None, :, :].expand(batch, self.shared, times, tokens, self.size)
        return spread.reshape(batch, self.heads, tokens, self.size)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cosine + turned * sine


class Llama(nn.Module):
    """RMS norm, rotary positions, key and value heads shared by several queries, a gated dense pair."""

    def __init__(self, tokens: int = 61, width: int = 40, heads: int = 4, length: int = 40):
        super().__init__()
        self.words = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(_LlamaBlock(width, heads, 2) for _ in range(2))
        self.norm, self.head = _RmsNorm(width), nn.Linear(width, tokens, bias=False)
        size = width // heads
        angles = torch.outer(torch.arange(length).float(), 100.0 ** (-torch.arange(0, size, 2).float() / size))
        self.register_buffer("angles", torch.cat((angles, angles), -1))

    def forward(self, ids: Tensor) -> Tensor:
        angles = self.angles[: ids.shape[1]]
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))
