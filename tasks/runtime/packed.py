"""A package's network as a diffusers component: small files in `denoiser/`, the live compressed model in memory.

Ships as `denoiser/packed.py`, which `model_index.json` names. Beside it: `config.json` (the diffusers model's), `packing.json`
(how tensors are stored) and `weights.safetensors`. Quantised layers are integers and scales, integers of fewer than 8 bits are
bit-packed, 2:4 layers are their kept values and a packed mask, shrunk layers have their real small shapes.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .cache import apply_cache, check_plan
from .checks import check_file, check_manifest, read_object
from .masks import restore_shapes
from .meaning import check_keys, check_opening_fits, check_recipe, is_list, short
from .precision import apply_precision, forget_originals, pack, unpack

FORMAT = 1  # of package.json and packing.json
WEIGHTS, PACKING, CONFIG = "weights.safetensors", "packing.json", "config.json"
MANIFEST, RECIPE, SCHEDULER = "package.json", "recipe.json", "scheduler/scheduler_config.json"
NEEDED = (RECIPE, SCHEDULER, *(f"denoiser/{name}" for name in (WEIGHTS, PACKING, CONFIG)))
CLASSES = ("DiTTransformer2DModel", "UNet2DModel")


class PackedDenoiser(torch.nn.Module):
    """The network with masks, cache and precision live: `denoiser(x, t, labels, step) -> prediction`.

    model: the diffusers model. recipe: `recipe.json` as read. The cache carries outputs from step to step: steps are taken
    in order from 0, one batch at a time.
    """

    def __init__(self, model: torch.nn.Module, recipe: dict):
        super().__init__()
        self.model, self.recipe, self.source = model, recipe, Path(RECIPE)
        plan = recipe["cache"]
        self._cache = apply_cache(model, plan["sublayers"], plan["compute"], plan.get("forecast", "none"),
                                  recipe["timesteps"], plan.get("weights")) if plan else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_) -> "PackedDenoiser":
        """Open the `denoiser/` folder of a package, once every data file of the package is found unchanged.

        Raises ValueError for a damaged package, and for a `torch_dtype`: precision is the recipe's affair.
        """
        if torch_dtype not in (None, torch.float32):
            raise ValueError(f"torch_dtype: {torch_dtype} given, but recipe.json sets the precision of every layer")
        denoiser = cls(*open_model(Path(folder)))
        denoiser.source = Path(folder).parent / RECIPE
        return denoiser

    def check_recipe(self, solvers: Collection[str], schedule: Mapping) -> None:
        """Raise ValueError unless the recipe means something for these solvers and this scheduler config."""
        with blamed_on(self.source):
            check_recipe(self.recipe, solvers, schedule.get("num_train_timesteps", 1000))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        """x: NCHW; t: (N,) fp32 or int64; labels: (N,) int64 or None -> NCHW (a learned variance is cut off)."""
        if self._cache is not None:
            self._cache.step = step
        return self.model(x, time_input(self.model, t), class_labels=labels, return_dict=False)[0][:, : x.shape[1]]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return shape_of(self.model)

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return classes_of(self.model)

    @property
    def null_label(self) -> int:
        """The number after the last class, of no label. Raises ValueError for a model that has none."""
        if not self.has_null_label:
            raise ValueError(f"guidance_scale: needs a null label; this model has {self.num_classes} classes and none")
        return self.num_classes

    @property
    def has_null_label(self) -> bool:
        config = self.model.config
        return "num_embeds_ada_norm" in config or (config.get("num_class_embeds") or 0) > self.num_classes

    def labels(self, wanted: list[int] | Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """(count,) int64 on `device`, None for an unconditional model. Raises ValueError for what the model cannot draw."""
        has_null = self.has_null_label
        if not self.num_classes:
            if wanted is not None:
                raise ValueError("class_labels: given, but the model is unconditional")
            return None
        if wanted is None and not has_null:
            raise ValueError(f"class_labels: missing; the model needs one of 0..{self.num_classes - 1} for each sample")
        labels = torch.as_tensor([self.num_classes] * count if wanted is None else wanted, dtype=torch.int64)
        highest = self.num_classes - (0 if has_null else 1)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
            raise ValueError(f"class_labels: {labels.tolist()} not all between 0 and {highest}")
        return labels.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def shape_of(model: torch.nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of its images."""
    size = model.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return model.config.in_channels, height, width


def classes_of(model: torch.nn.Module) -> int:
    """`_num_classes` is in the config of a UNet whose label table has a row more."""
    config = model.config
    return config.get("_num_classes") or config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0


def time_input(model: torch.nn.Module, t: Tensor) -> Tensor:
    """As the model takes it: a learned embedding (UNet2DModel's) has a row for each timestep, of which the nearest is taken."""
    return t.float().round().long() if model.config.get("time_embedding_type") == "learned" else t


def open_model(folder: Path) -> tuple[torch.nn.Module, dict]:
    """The diffusers model of a package's `denoiser/` folder, masks and precision live and the cache not, and its recipe.

    Raises ValueError in one line with the file that is damaged, means nothing or does not fit the others.
    """
    package = folder.parent
    verify(package)
    recipe, schedule, packing, config = (read_object(path) for path in (package / RECIPE, package / SCHEDULER, folder / PACKING,
                                                                        folder / CONFIG))
    with blamed_on(package / RECIPE):
        check_recipe(recipe, total=schedule.get("num_train_timesteps", 1000))
    with blamed_on(folder / PACKING):
        check_packing(packing)
    with blamed_on(folder / CONFIG):
        model = build_model(config)
    with blamed_on(package / RECIPE):
        check_layers(model, recipe)
    with blamed_on(folder / PACKING):
        restore_shapes(model, packing["kept"])
        apply_precision(model, recipe["precision"], packing["ranges"])
    with blamed_on(folder / WEIGHTS):
        model.load_state_dict(decode(load_file(folder / WEIGHTS), packing["tensors"]))
    forget_originals(model)
    return model.eval().requires_grad_(False), recipe


@contextlib.contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Whatever a file's content leads to is one line that begins with its name."""
    try:
        yield
    except Exception as error:  # diffusers, torch and safetensors raise a dozen kinds for a value they did not expect
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{' '.join(str(error).split())[:300]}") from error


def check_packing(packing: dict) -> None:
    check_keys("packing", packing, ("kept", "ranges", "tensors"), ("kept", "ranges", "tensors"))
    for name, found in packing.items():
        if not isinstance(found, dict):
            raise ValueError(f"packing: {name} {short(found)} is not an object")
    for block, count in packing["kept"].items():
        if type(count) is not int:
            raise ValueError(f"packing: kept units of {block}: {short(count)} is not a whole number")
    for name, how in packing["tensors"].items():
        check_keys(f"packing: {name}", how, ("shape", "bits", "masked"), ("shape", "bits", "masked"))
        if not is_list(how["shape"], int) or how["bits"] not in range(3, 9) or not isinstance(how["masked"], bool):
            raise ValueError(f"packing: {name}: {short(how)} is not a shape, 3 to 8 bits and whether it is masked")


def check_layers(model: torch.nn.Module, recipe: dict) -> None:
    """Raise ValueError for a sublayer or a layer that the model does not have, and for an opening of other images."""
    layers = {name for name, _ in model.named_modules()}
    for name in recipe["precision"]:
        if name not in layers:
            raise ValueError(f"recipe: precision of {name}: the model has no such layer")
    for name in (recipe["sparsity"] or {}).get("density", ()):
        if name.removesuffix(".qk").removesuffix(".av") not in layers:
            raise ValueError(f"recipe: density of {name}: the model has no such layer")
    if recipe.get("rows"):
        check_opening_fits(recipe["rows"][0].get("opening"), shape_of(model), classes_of(model))
    if recipe["cache"]:
        check_plan(model, recipe["cache"]["sublayers"], recipe["cache"]["compute"])


def build_model(config: dict) -> torch.nn.Module:
    """The diffusers model of a config, dense and with random weights."""
    import diffusers
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"_class_name {name!r} is not one of {', '.join(CLASSES)}")
    return getattr(diffusers, name).from_config(config)


def encode(state: dict[str, Tensor], bits: dict[str, int], masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """A state dict as it is stored, and its layout {name: {"shape", "bits", "masked"}} for those that are not stored plainly.

    bits: width of the integers in a tensor (int8 in memory). masks: bool, of the tensor's shape; what is False is zero.
    """
    stored, layout = {}, {}
    for name, tensor in state.items():
        mask, width = masks.get(name), bits.get(name, 8)
        stored[name] = tensor.contiguous()
        if mask is None and width == 8:
            continue
        layout[name] = {"shape": list(tensor.shape), "bits": width, "masked": mask is not None}
        values = tensor.flatten()
        if mask is not None:
            values = values[mask.flatten()]
            stored[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.flatten().numpy()))
        stored[name] = pack(values, width) if width < 8 else values
    return stored, layout


def decode(stored: dict[str, Tensor], layout: dict) -> dict[str, Tensor]:
    """The inverse of `encode`."""
    state = {name: tensor for name, tensor in stored.items() if name.removesuffix(".mask") not in layout}
    for name, how in layout.items():
        count, mask = int(np.prod(how["shape"])), None
        if how["masked"]:
            mask = torch.from_numpy(np.unpackbits(stored[f"{name}.mask"].numpy(), count=count)).bool()
        kept = count if mask is None else int(mask.sum())
        values = unpack(stored[name], how["bits"], kept) if how["bits"] < 8 else stored[name]
        full = values if mask is None else torch.zeros(count, dtype=values.dtype).masked_scatter(mask, values)
        state[name] = full.reshape(how["shape"])
    return state


def read_manifest(folder: Path) -> dict[str, dict]:
    """The files that `package.json` names. Raises ValueError where it is not one that this code reads."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{path}: not found; expected a package")
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')}, this code reads format {FORMAT}")
    return check_manifest(path, manifest.get("files"))


def verify(folder: Path) -> None:
    """Raise ValueError unless every data file named by `package.json` is there, whole and unchanged, and none is missing in it.

    The graphs in `openvino/` may be left out of a copy. Code is not covered: it cannot vouch for itself.
    """
    files = read_manifest(folder)
    for name in NEEDED:
        if name not in files:
            raise ValueError(f"{folder / MANIFEST}: does not name {name}")
    for name, expected in files.items():
        if not name.startswith("openvino/") or (folder / "openvino").exists():
            check_file(folder, name, expected)
