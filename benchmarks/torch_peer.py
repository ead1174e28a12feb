"""The same clipped gradient in PyTorch: torch.func and Opacus, in milliseconds per view.

Called by `clipped_gradient.py --peers`; prints one JSON line `{method: {K: ms per view}}`.
The network has the architecture and the parameter count of `dpnb.models.WideResNet`.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

VIEWS = 64
SLOW = 20.0  # seconds: a call that takes longer is measured once


class Conv(nn.Module):
    """Convolution with 'SAME' padding as in JAX, bias, and weight standardisation with gain."""

    def __init__(self, cin, cout, size, stride=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, size, size) / (cin * size * size) ** 0.5)
        self.gain = nn.Parameter(torch.ones(cout))
        self.bias = nn.Parameter(torch.zeros(cout))
        self.stride, self.size = stride, size

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        fan_in = self.weight[0].numel()
        scale = self.gain.view(-1, 1, 1, 1) * (variance * fan_in).clamp(min=1e-4).rsqrt()
        return F.conv2d(pad(x, self.size, self.stride), (self.weight - mean) * scale, self.bias, self.stride)


class PlainConv(nn.Module):
    """The same without weight standardisation; Opacus has a rule for the layer inside."""

    def __init__(self, cin, cout, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, stride)
        self.stride, self.size = stride, size

    def forward(self, x):
        return self.conv(pad(x, self.size, self.stride))


def pad(x, size, stride):
    """'SAME' padding of an even image: the smaller half in front."""
    missing = max(0, size - stride)
    return F.pad(x, (missing // 2, missing - missing // 2) * 2) if missing else x


class Block(nn.Module):
    def __init__(self, conv, cin, cout, stride, first):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(16, cin), conv(cin, cout, 3, stride)
        self.norm2, self.conv2 = nn.GroupNorm(16, cout), conv(cout, cout, 3)
        self.first = first
        if first:
            self.skip_norm, self.skip_conv = nn.GroupNorm(16, cin), conv(cin, cout, 1, stride)

    def forward(self, x):
        skip = self.skip_conv(self.skip_norm(F.relu(x))) if self.first else x
        y = self.conv1(self.norm1(F.relu(x)))
        return self.conv2(self.norm2(F.relu(y))) + skip


class WideResNet(nn.Module):
    def __init__(self, depth, width, conv=Conv, classes=10):
        super().__init__()
        self.stem = conv(3, 16, 3)
        blocks, cin = [], 16
        for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(conv, cin, channels, stride if i == 0 else 1, i == 0))
                cin = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.linear = nn.GroupNorm(16, cin), nn.Linear(cin, classes)

    def forward(self, x):
        return self.linear(self.norm(F.relu(self.blocks(self.stem(x)))).mean((2, 3)))


def clip_and_sum(grads):
    """Per-example gradients {name: [examples, ...]} -> clipped to norm 1 and summed."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    factor = 1 / norms.clamp(min=1)
    return {name: torch.tensordot(factor, g, 1) for name, g in grads.items()}


def torch_func(model, images, labels):
    """A function that computes the clipped sum with torch.func, over images [examples, K, ...]."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, images, label):
        return F.cross_entropy(functional_call(model, params, (images,)), label.expand(len(images)))

    per_example = vmap(grad(loss), (None, 0, 0))
    return lambda: clip_and_sum(per_example(params, images, labels))


def opacus(model, images, labels):
    """The same with Opacus: gradients per view, whose mean over the views is clipped."""
    from opacus import GradSampleModule

    examples, k = images.shape[:2]
    wrapped = GradSampleModule(model, loss_reduction="mean")

    def run():
        wrapped.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(images.flatten(0, 1)), labels.repeat_interleave(k)).backward()
        grads = {}
        for name, p in model.named_parameters():
            grads[name] = p.grad_sample.view(examples, k, *p.shape).mean(1)
            p.grad_sample = None
        return clip_and_sum(grads)

    return run


def milliseconds(run, rounds):
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    times = [first] if first > SLOW else []
    while len(times) < rounds and first <= SLOW:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3 / VIEWS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 4, 1])
    parser.add_argument("--plain-conv", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for method in (torch_func, opacus):
        name = {"torch_func": "torch.func", "opacus": "Opacus"}[method.__name__]
        for k in args.k:
            model = WideResNet(args.depth, args.width, PlainConv if args.plain_conv else Conv)
            images = torch.randn(VIEWS // k, k, 3, 32, 32)
            labels = torch.arange(VIEWS // k) % 10
            try:
                results.setdefault(name, {})[k] = milliseconds(method(model, images, labels), args.rounds)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del results[name]
                break
    print(json.dumps(results))


if __name__ == "__main__":
    main()
