"""What no cheaper way of handling weights and steps can save of an evaluation: the operations between the layers, which a plain
one does as well, and the layers' products."""

from collections.abc import Callable, Iterable, Mapping
from statistics import median

from torch.profiler import ProfilerActivity, profile

BETWEEN = ("aten::gelu", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::native_layer_norm")
PRODUCTS = ("onednn::qlinear_pointwise", "onednn::qconv_pointwise", "aten::addmm", "aten::mm", "aten::mkldnn_convolution")
Seconds = Mapping[str, float]  # operation -> in it alone


def profiled(f: Callable, *args) -> tuple[object, Seconds]:
    """-> f(*args), where its time went."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        found = f(*args)
    return found, {op.key: op.self_cpu_time_total / 1e6 for op in watched.key_averages()}


def floor_numbers(spent: Iterable[tuple[Seconds, Seconds]]) -> dict[str, float]:
    """spent: of each candidate by ours and the plain way. -> medians of shares of the plain way's time."""
    def share(own: Seconds, plain: Seconds, operations: Iterable[str]) -> float:
        return sum(own.get(name, 0.0) for name in operations) / sum(plain.values())

    spent = list(spent)
    return {metric: median(share(own, plain, operations) for own, plain in spent)
            for metric, operations in (("between_share", BETWEEN), ("products_share", PRODUCTS),
                                       ("floor_share", (*BETWEEN, *PRODUCTS)))}
