"""The DEQ-Transformer in PyTorch, on torchdeq, which `deq_flax.models.deq_transformer` is timed against.

The sizes and the work are the same: adaptive embedding, Transformer-XL attention with memory of states and injections, weight
norm computed once a solve, post-norm, adaptive softmax, Adam, clipping. Written for speed as PyTorch users would: keys of the
memory and relative keys are computed once a solve too. B batch, L length, M memory, K keys, D features.
"""

from itertools import pairwise

import torch
import torchdeq
from torch import nn
from torch.nn import functional

from benchmarks.training import words

WORDS, WIDTH, BATCH, LENGTH = 10_000, 256, 8, 64


class AdaptiveEmbedding(nn.Module):
    def __init__(self, vocab, width, cutoffs, div):
        super().__init__()
        edges = [0, *cutoffs, vocab]
        self.bounds = list(pairwise(edges))
        self.tables = nn.ModuleList(nn.Embedding(b - a, width // div**i) for i, (a, b) in enumerate(self.bounds))
        self.projections = nn.ModuleList(nn.Linear(width // div**i, width, bias=False) for i in range(len(self.bounds)))
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.01)
        self.scale = width**0.5

    def forward(self, tokens):
        flat = tokens.reshape(-1)
        out = torch.zeros(flat.numel(), self.projections[0].out_features)
        for (low, high), table, projection in zip(self.bounds, self.tables, self.projections, strict=True):
            index = ((flat >= low) & (flat < high)).nonzero().squeeze(1)
            out = out.index_copy(0, index, projection(table(flat[index] - low)))
        return out.view(*tokens.shape, -1) * self.scale


class Cell(nn.Module):
    """One Transformer-XL block."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads, self.width = heads, width
        norm = nn.utils.parametrizations.weight_norm
        self.qkv = norm(nn.Linear(width, 3 * width, bias=False))
        self.relative = norm(nn.Linear(width, width, bias=False))
        self.out = norm(nn.Linear(width, width))
        self.inner = norm(nn.Linear(width, inner))
        self.outer = norm(nn.Linear(inner, width))
        self.content_bias = nn.Parameter(0.01 * torch.randn(heads, 1, width // heads))
        self.position_bias = nn.Parameter(0.01 * torch.randn(heads, 1, width // heads))

    def split(self, x):
        return x.view(*x.shape[:2], -1, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4)

    def context(self, injection, memory, memory_injection):
        """Tensors that are constant during a solve."""
        length, n_keys = injection.shape[1], injection.shape[1] + memory.shape[1]
        qkv = self.qkv.weight
        memory_kv = self.split(functional.linear(memory, qkv[self.width :]) + memory_injection[..., self.width :])
        distance = torch.arange(n_keys - 1, -1, -1.0)
        angles = distance[:, None] / 10000 ** (torch.arange(0, self.width, 2) / self.width)
        positions = torch.cat([angles.sin(), angles.cos()], -1)
        relative = self.relative(positions).view(n_keys, self.heads, -1).transpose(0, 1)
        relative = functional.pad(relative, (0, 0, 1, 0))
        later = torch.arange(n_keys)[None] > torch.arange(length)[:, None] + memory.shape[1]
        bias = torch.zeros(length, n_keys).masked_fill(later, -1e30)
        return qkv, injection, memory_kv, relative, bias, self.out.weight, self.inner.weight, self.outer.weight

    def forward(self, z, context):
        qkv, injection, memory_kv, relative, bias, out, inner, outer = context
        scale = (self.width // self.heads) ** -0.5
        q, k, v = self.split(functional.linear(z, qkv) + injection)
        k, v = torch.cat([memory_kv[0], k], 2), torch.cat([memory_kv[1], v], 2)
        q = q * scale
        by_distance = (q + self.position_bias * scale) @ relative.transpose(-1, -2)
        batch, heads, length, n = by_distance.shape
        by_distance = by_distance.reshape(batch, heads, -1)[..., length:].view(batch, heads, length, n - 1)
        scores = (q + self.content_bias * scale) @ k.transpose(-1, -2) + by_distance + bias
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(z.shape)
        x = functional.layer_norm(z + functional.linear(seen, out, self.out.bias), (self.width,))
        hidden = functional.linear(functional.linear(x, inner, self.inner.bias).relu(), outer, self.outer.bias)
        return functional.layer_norm(x + hidden, (self.width,))


class Model(nn.Module):
    def __init__(self, *, vocab, width, heads, inner, cutoffs, div, steps):
        super().__init__()
        self.embedding = AdaptiveEmbedding(vocab, width, cutoffs, div)
        self.injection = nn.Linear(width, 3 * width)
        self.cell = Cell(width, heads, inner)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, vocab, cutoffs, div_value=div, head_bias=True)
        # Its Broyden makes one call of f more than its limit.
        options = dict(b_solver="broyden", b_max_iter=steps - 1, b_tol=0.0, f_tol=0.0, f_stop_mode="rel")
        self.deq = torchdeq.get_deq(f_solver="anderson", f_max_iter=steps, ift=True, **options)

    def equation(self, tokens, memory):
        """(f, z0)."""
        injection = self.injection(self.embedding(tokens))
        context = self.cell.context(injection, *memory)
        return lambda z: self.cell(z, context), torch.zeros(*tokens.shape, self.cell.width)

    def solve(self, tokens, memory):
        return self.deq(*self.equation(tokens, memory))[0][-1]

    def loss(self, z, targets):
        return self.softmax(z.reshape(-1, self.cell.width), targets.reshape(-1)).loss

    def forward(self, tokens, memory, targets):
        return self.loss(self.solve(tokens, memory), targets)


def timed(steps, n_memory=LENGTH):
    """A model of the sizes that are compared, the inputs of its equation, and targets."""
    torch.manual_seed(0)
    model = Model(vocab=WORDS, width=WIDTH, heads=8, inner=1024, cutoffs=[2_000, 5_000], div=4, steps=steps)
    stream = torch.tensor(words(WORDS, BATCH * LENGTH + 1)).long()
    memory = torch.zeros(BATCH, n_memory, WIDTH), torch.zeros(BATCH, n_memory, 3 * WIDTH)
    return model, (stream[:-1].view(BATCH, LENGTH), memory), stream[1:].view(BATCH, LENGTH)
