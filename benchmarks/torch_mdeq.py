"""The multiscale DEQ for CIFAR-10 in PyTorch, on torchdeq, which `deq_flax.models.mdeq` is timed against.

The sizes and the work are the same: weight norm in blocks and after fusion, computed once a solve, group norm, batch norm in
stem and head, cross entropy, Broyden's method both ways. Written for speed as PyTorch users would: channels last, in the
state too, so that torchdeq's flattening needs no transposition; the first convolutions from a branch to all finer ones as
one, likewise those to all coarser ones; operations in place where no gradient needs the operand.
"""

from itertools import pairwise

import torch
import torchdeq
from torch import nn
from torch.nn import functional

from benchmarks import training


def convolution(c_in, c_out, size, stride=1, *, bias=False, weight_norm=False):
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=bias)
    if weight_norm:
        return nn.utils.parametrizations.weight_norm(conv)
    nn.init.normal_(conv.weight, 0.0, 0.01)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


def conv_batch_norm(c_in, c_out, size, stride=1, *, bias=False, affine=True, relu=True):
    layers = [convolution(c_in, c_out, size, stride, bias=bias), nn.BatchNorm2d(c_out, affine=affine)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * relu)


class Bottleneck(nn.Module):
    def __init__(self, c_in, width):
        super().__init__()
        self.path = nn.Sequential(
            conv_batch_norm(c_in, width, 1, affine=False),
            conv_batch_norm(width, width, 3, affine=False),
            conv_batch_norm(width, 4 * width, 1, affine=False, relu=False),
        )
        self.shortcut = nn.Identity() if c_in == 4 * width else conv_batch_norm(c_in, 4 * width, 1, relu=False)

    def forward(self, x):
        return functional.relu(self.path(x) + self.shortcut(x), inplace=True)


class Head(nn.Module):
    def __init__(self, channels, head_channels, final_channels, num_classes):
        super().__init__()
        widths = [4 * width for width in head_channels]
        self.branches = nn.ModuleList(Bottleneck(c, width) for c, width in zip(channels, head_channels, strict=True))
        self.down = nn.ModuleList(conv_batch_norm(a, b, 3, 2, bias=True) for a, b in pairwise(widths))
        self.final = conv_batch_norm(widths[-1], final_channels, 1, bias=True)
        self.classifier = nn.Linear(final_channels, num_classes)

    def forward(self, branches):
        total, *parts = [layer(x) for layer, x in zip(self.branches, branches, strict=True)]
        for layer, part in zip(self.down, parts, strict=True):
            total = part + layer(total)
        return self.classifier(self.final(total).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels, expansion, groups):
        super().__init__()
        inner = expansion * channels
        self.conv1 = convolution(channels, inner, 3, weight_norm=True)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.conv2 = convolution(inner, channels, 3, weight_norm=True)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, z, kernels, injection):
        inner = functional.relu(self.norm1(functional.conv2d(z, kernels[0], padding=1)), inplace=True)
        x = functional.conv2d(inner, kernels[1], padding=1)
        if injection is not None:
            x.add_(injection)
        return self.norm3(functional.relu(self.norm2(x).add_(z), inplace=True))


def path(c_in, c_out, levels, groups):
    """The path from a branch to one that is `levels` coarser: the first convolution, and the layers after it."""
    if levels < 0:
        follow = [nn.GroupNorm(groups, c_out), nn.Upsample(scale_factor=2**-levels)]
        return nn.Sequential(convolution(c_in, c_out, 1), nn.Sequential(*follow))
    widths = [c_in] * levels + [c_out]
    first, *layers = [[convolution(a, b, 3, 2), nn.GroupNorm(groups, b)] for a, b in pairwise(widths)]
    follow = [first[1]]
    for layer in layers:
        follow += [nn.ReLU(inplace=True), *layer]
    return nn.Sequential(first[0], nn.Sequential(*follow))


def laid_out(weight):
    return weight.contiguous(memory_format=torch.channels_last)


def side_by_side(paths):
    """The first convolutions of paths as one: kernel, stride, padding, and the channels of each."""
    convs = [to[0] for to in paths]
    kernel = laid_out(torch.cat([conv.weight for conv in convs]))
    return kernel, convs[0].stride, convs[0].padding, [conv.out_channels for conv in convs]


def send(x, paths, first):
    """The contributions of a branch to all others."""
    parts = []
    for kernel, stride, padding, widths in first:
        parts += functional.conv2d(x, kernel, None, stride, padding).split(widths, 1)
    return [to[1](part) for to, part in zip(paths, parts, strict=True)]


class Cell(nn.Module):
    """A block for each branch, then fusion of all branches into each, then one more convolution each."""

    def __init__(self, channels, expansion, groups):
        super().__init__()
        numbered = list(enumerate(channels))
        self.blocks = nn.ModuleList(Block(c, expansion, groups) for c in channels)
        self.paths = nn.ModuleList(  # of each branch to all others, the finest first
            nn.ModuleList(path(a, b, i - j, groups) for i, b in numbered if i != j) for j, a in numbered
        )
        self.post = nn.ModuleList(convolution(c, c, 1, weight_norm=True) for c in channels)
        self.post_norms = nn.ModuleList(nn.GroupNorm(groups // 2, c, affine=False) for c in channels)

    def context(self, injection):
        """Tensors that are constant during a solve."""
        blocks = [(laid_out(block.conv1.weight), laid_out(block.conv2.weight)) for block in self.blocks]
        first = [[side_by_side(to) for to in (paths[:j], paths[j:]) if len(to)] for j, paths in enumerate(self.paths)]
        return injection, blocks, first, [laid_out(conv.weight) for conv in self.post]

    def forward(self, z, context):
        injection, blocks, first, post = context
        injections = [injection, *[None] * (len(z) - 1)]
        x = [block(*parts) for block, *parts in zip(self.blocks, z, blocks, injections, strict=True)]
        sent = [send(*parts) for parts in zip(x, self.paths, first, strict=True)]
        out = []
        for i, (total, kernel, norm) in enumerate(zip(x, post, self.post_norms, strict=True)):
            part, *others = [parts[i - (j < i)] for j, parts in enumerate(sent) if j != i]
            total = total + part  # not in place: the others' gradients need it
            for part in others:
                total.add_(part)
            out.append(norm(functional.conv2d(functional.relu(total, inplace=True), kernel)))
        return out


class Model(nn.Module):
    """Images are (B, 3, H, W), with sides that can be halved for every branch; branches of the state are (B, H, W, C)."""

    def __init__(self, *, num_classes, channels, head_channels, final_channels, expansion, groups, steps):
        super().__init__()
        width = channels[0]
        mix = [conv_batch_norm(width, width, 1)] if len(channels) > 2 else []
        self.stem = nn.Sequential(conv_batch_norm(3, width, 3), conv_batch_norm(width, width, 3), *mix)
        self.cell = Cell(channels, expansion, groups)
        self.head = Head(channels, head_channels, final_channels, num_classes)
        self.channels = channels
        # Its Broyden makes one call of f more than its limit.
        forward = dict(f_solver="broyden", f_max_iter=steps - 1, f_tol=0.0, f_stop_mode="rel")
        backward = dict(b_solver="broyden", b_max_iter=steps - 1, b_tol=0.0, b_stop_mode="rel")
        self.deq = torchdeq.get_deq(ift=True, **forward, **backward)
        self.to(memory_format=torch.channels_last)

    def equation(self, images):
        """(f, z0); f takes one argument for each branch."""
        context = self.cell.context(self.stem(laid_out(images)))
        batch, _, height, width = images.shape
        z0 = [torch.zeros(batch, height >> i, width >> i, c) for i, c in enumerate(self.channels)]
        return lambda *z: [x.permute(0, 2, 3, 1) for x in self.cell([x.permute(0, 3, 1, 2) for x in z], context)], z0

    def loss(self, z, labels):
        return functional.cross_entropy(self.head([x.permute(0, 3, 1, 2) for x in z]), labels)

    def forward(self, images, labels):
        z, _ = self.deq(*self.equation(images))
        return self.loss(z[-1], labels)


def timed(variant, steps, batch=8):
    """The model of a variant of configs/cifar10.py, the inputs of its equation, and targets."""
    torch.manual_seed(0)
    sizes = training.resolved(f"configs/cifar10.py:{variant}").model
    names = ("num_classes", "channels", "head_channels", "final_channels", "expansion", "groups")
    model = Model(**{name: getattr(sizes, name) for name in names}, steps=steps)
    return model, (torch.randn(batch, 3, 32, 32),), torch.randint(0, sizes.num_classes, (batch,))
