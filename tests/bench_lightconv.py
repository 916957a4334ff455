"""LightConv's fast form against depthwise conv1d, forward and backward: ``python tests/bench_lightconv.py``.

The promise is four times at T=32, K=15, B=64, C=256, H=8 on two CPU cores. The two forms are timed in turns;
times are in milliseconds. Where the ratio of the best times and that of the medians disagree, other work was
using the cores and the measurement says little.
"""

import argparse
import statistics
import time

import torch

from mclip.text_encoder import LightConv, light_conv_reference


def milliseconds(forward, leaves: list[torch.Tensor], grad: torch.Tensor) -> float:
    """Time of one forward and backward pass."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    forward().backward(grad)
    return 1e3 * (time.perf_counter() - start)


def measure(batch=64, length=32, channels=256, heads=8, taps=15, rounds=100, threads=2) -> dict[str, float]:
    """Times of ``rounds`` turns, their ratios, and the largest difference of outputs and input gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    conv = LightConv(channels, heads, taps)
    x = torch.randn(batch, length, channels, requires_grad=True)
    grad, leaves = torch.randn(batch, length, channels), [x, conv.weight]

    def fast():
        return conv(x)

    def slow():
        return light_conv_reference(x, conv.weight.softmax(1))

    times, results = {"toeplitz": [], "conv1d": []}, {}
    for turn in range(rounds + 5):
        for name, forward in (("toeplitz", fast), ("conv1d", slow)):
            elapsed = milliseconds(forward, leaves, grad)
            if turn >= 5:
                times[name].append(elapsed)
            results[name] = [forward().detach(), x.grad]
    difference = max(float((a - b).abs().max()) for a, b in zip(*results.values(), strict=True))
    report = {}
    for label, summary in (("best", min), ("median", statistics.median)):
        fast_time, slow_time = summary(times["toeplitz"]), summary(times["conv1d"])
        report |= {f"toeplitz {label}": fast_time, f"conv1d {label}": slow_time}
        report[f"ratio {label}"] = slow_time / fast_time
    return {**report, "max difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--taps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for key, value in measure(length=options.length, taps=options.taps, threads=options.threads).items():
        print(f"{key:>15}  {value:.3g}")
