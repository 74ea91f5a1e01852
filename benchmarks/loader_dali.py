"""A recipe's views as a graph of DALI's CPU operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found, import-untyped, unused-ignore]

from ssl_methods.view_plan import ViewSpec
from ssl_methods.views import ViewRecipe


def build_pipeline(
    tars: Sequence[str], extension: str, recipe: ViewRecipe, sides: Sequence[int], *, batch: int, threads: int
) -> Any:
    """Build a pipeline whose outputs are the views, uint8."""

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, seed=0)  # type: ignore[untyped-decorator, unused-ignore]
    def views() -> Any:
        data, _ = fn.readers.webdataset(
            paths=list(tars),
            ext=[extension, "cls"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        return tuple(_view(image, spec, side) for spec, side in zip(recipe.views, sides, strict=True))

    pipeline = views()
    pipeline.build()
    return pipeline


def _view(image: Any, spec: ViewSpec, side: int) -> Any:
    interpolation = types.INTERP_CUBIC if spec.interpolation == "bicubic" else types.INTERP_LINEAR
    view = fn.random_resized_crop(
        image,
        size=(side, side),
        random_area=spec.crop_scale,
        random_aspect_ratio=spec.crop_ratio,
        interp_type=interpolation,
        antialias=True,
    )
    view = fn.flip(view, horizontal=fn.random.coin_flip(probability=spec.flip_p))
    if spec.jitter_p:
        view = _jitter(view, spec)
    if spec.grayscale_p:
        view = fn.hsv(view, saturation=1.0 - _happens(spec.grayscale_p))
    if spec.blur_p:
        # A window of one pixel leaves the image as it is; a deviation of 0 lets the window decide.
        blurs = _happens(spec.blur_p)
        sigma = fn.random.uniform(range=spec.blur_sigma) * blurs
        window = fn.cast(sigma * 3.0 + 0.5, dtype=types.INT32) * 2 + 1
        view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
    if spec.solarise_p:
        inverts = (view >= 128) * fn.cast(_happens(spec.solarise_p), dtype=types.UINT8)
        view = fn.cast(view * (1 - inverts) + (255 - view) * inverts, dtype=types.UINT8)
    return view


def _jitter(view: Any, spec: ViewSpec) -> Any:
    happens = _happens(spec.jitter_p)
    factors = {
        name: 1.0 + happens * fn.random.uniform(range=(-min(strength, 1.0), strength))
        for name, strength in {
            "brightness": spec.brightness,
            "contrast": spec.contrast,
            "saturation": spec.saturation,
        }.items()
        if strength
    }
    if spec.hue:
        factors["hue"] = happens * fn.random.uniform(range=(-360 * spec.hue, 360 * spec.hue))
    return fn.color_twist(view, **factors)


def _happens(probability: float) -> Any:
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)
